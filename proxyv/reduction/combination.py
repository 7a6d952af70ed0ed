"""Which methods go together with ProxyV layers, and why the others do not."""

from __future__ import annotations

from proxyv.reduction.base import DecoderReduction, Reduction

__all__ = ["check_combination"]


def check_combination(
    method: Reduction,
    *,
    num_patches: int,
    num_layers: int,
    start_layer: int | None,
    proxy_kind: str | None,
) -> None:
    """Refuse a method that a model cannot carry out.

    Args:
        method: with its options.
        num_patches: patches of a crop.
        num_layers: depth of the language model.
        start_layer: first ProxyV layer, None for a baseline.
        proxy_kind: "spatial" or "learned"; None where layers skip and make none.

    Raises:
        ValueError: the reason, and what to use instead.
    """
    tokens = method.tokens_per_crop(num_patches)
    drops = method.drops(num_layers) if isinstance(method, DecoderReduction) else ()
    if start_layer is None:
        return
    if proxy_kind == "spatial" and (not method.keeps_grid or tokens is None):
        raise ValueError(
            f"proxy_kind='spatial' cannot go with reduction method {method.name!r}: the tokens "
            "that are left of a crop are no grid to downsample. Use proxy_kind='learned', or a "
            "method that keeps a grid: average_pool, downsample or tokenpacker"
        )
    late = [drop.scoring for drop in drops if drop.scoring >= start_layer]
    if late and isinstance(method, DecoderReduction) and method.all_queries:
        raise ValueError(
            f"reduction method {method.name!r} scores image tokens by their own attention in layer "
            f"{late[0]}, but from start_layer={start_layer} on image tokens are no queries: end "
            "its scheme before that layer, or use fastv or pyramiddrop"
        )
