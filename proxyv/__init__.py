"""ProxyV: vision-language models that keep every vision token and compute with a few proxies.

Importing the package registers the model type "proxyv" with the Auto classes of transformers and
does nothing else: no class and no instance of transformers is changed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from proxyv.config import ProxyVConfig
from proxyv.model.families import ProxyVLlamaDecoderLayer, ProxyVLlamaModel
from proxyv.model.modeling import ProxyVForConditionalGeneration, ProxyVModel
from proxyv.model.processing import ProxyVProcessor

__all__ = [
    "ProxyVConfig",
    "ProxyVForConditionalGeneration",
    "ProxyVLlamaDecoderLayer",
    "ProxyVLlamaModel",
    "ProxyVModel",
    "ProxyVProcessor",
]

AutoConfig.register("proxyv", ProxyVConfig, exist_ok=True)
AutoModel.register(ProxyVConfig, ProxyVModel, exist_ok=True)
AutoModelForImageTextToText.register(ProxyVConfig, ProxyVForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ProxyVConfig, ProxyVProcessor, exist_ok=True)
