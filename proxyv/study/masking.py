"""Hiding vision tokens from vision tokens in the last layers of a trained model.

Nothing is trained and no class is changed: hooks of torch hand those layers another attention
mask. A vision token always sees itself, so where everything else is hidden it gets what layers
with ``skip="atn"`` give it. Newlines and text see all that they saw.

Source: paper section 3.1, figure 2 and the training-free rows of table 1. Differs: nothing known;
    the paper does not print its mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from proxyv.model.decoder import ProxyVLayerMixin
from proxyv.model.masks import masked_attention, to_backend, visible

__all__ = ["HIDDEN", "masked_layers", "vision_mask"]

HIDDEN = ("vision", "all")


@contextmanager
def masked_layers(model: Any, number: int, hidden: str = "vision") -> Iterator[list[int]]:
    """Mask vision tokens in the last layers of a model while the block runs.

    ProxyV layers, and layers that skip, are left alone: their vision tokens are no queries.

    Args:
        model: a ``ProxyVForConditionalGeneration``, a baseline or not.
        number: how many layers, counted from the last one backwards.
        hidden: what a vision token does not see; other "vision" tokens, or "all" others.

    Yields:
        The layers that are masked.

    Raises:
        ValueError: an unknown ``hidden``, more layers than there are, an attention function that
            takes no masks, or token reduction that leaves layers different rows.
    """
    decoder = model.model.language_model
    depth = len(decoder.layers)
    if hidden not in HIDDEN:
        raise ValueError(f"hidden={hidden!r} is not known: use one of {', '.join(HIDDEN)}")
    if not 0 <= number <= depth:
        raise ValueError(f"{number} layers cannot be masked: the model has {depth}")
    name = decoder.config._attn_implementation
    if masked_attention(name) != name:
        raise ValueError(f"attn_implementation={name!r} takes no masks: use 'sdpa' or 'eager'")
    method = model.config.reduction_method
    if method is not None and (method.stage == "decoder" or model.config.image_decides):
        raise ValueError(
            f"reduction method {method.name!r} drops rows on the way through the decoder, so no "
            "mask of the prompt fits its layers: mask a model whose config.json says reduction null"
        )
    chosen = [
        index
        for index in range(depth - number, depth)
        if not isinstance(decoder.layers[index], ProxyVLayerMixin)
    ]
    masker = _Masker(model.model, hidden)
    hooks = []
    if chosen:
        hooks += [
            model.model.register_forward_pre_hook(masker.see_images, with_kwargs=True),
            decoder.register_forward_pre_hook(masker.make_mask, with_kwargs=True),
        ]
    for index in chosen:
        layer = decoder.layers[index]
        hooks.append(layer.register_forward_pre_hook(masker.hand_mask, with_kwargs=True))
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def vision_mask(vision: Tensor, slots: Tensor, real: Tensor, hidden: str) -> Tensor:
    """The mask itself.

    Args:
        vision: (B, S) True at vision tokens.
        slots: (B, S) order of visibility, as in ``SequenceLayout``.
        real: (B, S) False at padding.
        hidden: see ``masked_layers``.

    Returns:
        (B, S, S) True where the row's token sees the column's.
    """
    seen = visible(slots, slots, real)
    keys = vision[:, None, :] if hidden == "vision" else torch.ones_like(vision)[:, None, :]
    itself = torch.eye(vision.shape[1], dtype=torch.bool, device=vision.device)
    return seen & ~(vision[:, :, None] & keys & ~itself)


class _Masker:
    """The hooks of one model, and the mask of the pass that is under way."""

    def __init__(self, model: Any, hidden: str) -> None:
        self.model, self.hidden = model, hidden
        self.image_mask: Tensor | None = None
        self.mask: Any = None

    def see_images(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the model: which rows are of images."""
        self.image_mask = module.image_mask(kwargs.get("input_ids"), kwargs.get("inputs_embeds"))

    def make_mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the language model: the mask of this pass, None where it reads no image."""
        layout, mask, cache = (
            kwargs.get(name) for name in ("layout", "attention_mask", "past_key_values")
        )
        self.mask, vision = None, self.image_mask
        if vision is None or not bool(vision.any()):
            return
        B, S = vision.shape
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "an image on top of cached tokens cannot be masked: give the conversation at once"
            )
        slots = torch.arange(S, device=vision.device).expand(B, S)
        if layout is not None:
            # Padding repeats an entry that is a row of an image, or the row 0 of text.
            rows = torch.zeros_like(vision, dtype=torch.int)
            rows.scatter_add_(1, layout.full_index, layout.full_valid.int())
            vision, slots = rows > 0, layout.slots
        real = torch.ones_like(vision) if mask is None else mask[:, :S].bool()
        seen = vision_mask(vision, slots, real, self.hidden)
        if cache is not None:  # a static cache hands on more keys than there are rows
            length = int(cache.get_mask_sizes(S, 0)[0])
            seen = torch.nn.functional.pad(seen, (0, length - S), value=False)
        dtype = kwargs["inputs_embeds"].dtype
        self.mask = to_backend(seen, module.config._attn_implementation, dtype)

    def hand_mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a masked layer: the mask in place of the one it was given."""
        return None if self.mask is None else (args, {**kwargs, "attention_mask": self.mask})
