"""Which part of a model a parameter belongs to: what stages train, freeze and report by."""

from __future__ import annotations

__all__ = ["parameter_part"]

_PARTS = {
    ".vision_tower.": "vision_tower",
    ".multi_modal_projector.": "projector",
    ".image_newline.": "newline",
    ".guided_update.": "proxyv",
    ".proxy_initializer.": "proxyv",
    ".light_mlp.": "proxyv",
    ".language_model.": "language_model",
    ".lm_head.": "lm_head",
}


def parameter_part(name: str) -> str:
    """Which part of the model a parameter belongs to, by its name.

    Args:
        name: as ``named_parameters`` gives it, prefixes of wrappers included.

    Returns:
        "vision_tower", "projector", "newline", "proxyv", "language_model" or "lm_head".

    Raises:
        ValueError: a name that belongs to no part.
    """
    dotted = f".{name}."
    for mark, part in _PARTS.items():
        if mark in dotted:
            return part
    raise ValueError(f"parameter {name!r} belongs to no part of a ProxyV model")
