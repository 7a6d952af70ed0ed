"""The ProxyV model: layout, masks, proxies, guided update, decoder, whole model, processor."""
