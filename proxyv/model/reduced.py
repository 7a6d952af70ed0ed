"""What a language model hands to token reduction: which rows are what, and what it cannot serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from proxyv.model.layout import SequenceLayout
from proxyv.reduction.rows import Rows, count_positions

__all__ = ["prompt_rows", "refuse_unsuited"]


def prompt_rows(
    layout: SequenceLayout | None,
    real: Tensor,
    position_ids: Tensor | None,
    judges: Tensor | None,
) -> Rows:
    """Describe a prompt to a method.

    Args:
        layout: of the rows; None where there are no images.
        real: (B, S) False at padding.
        position_ids: (B, S) as the caller counts them, empty rows included; None counts here.
        judges: (B, S) True at rows that judge, or None for the last of each sample.
    """
    empty = torch.zeros_like(real)
    image, newline = empty, empty
    if layout is not None:
        image, newline = layout.full_rows & real, layout.newline
        empty = empty if layout.empty is None else layout.empty
    valid = real & ~empty
    positions = count_positions(valid)
    if position_ids is not None:
        positions = position_ids - (real & empty).long().cumsum(dim=1)
    if judges is not None:
        judges = judges.to(real.device).bool()
    return Rows.build(image, valid=valid, newline=newline, positions=positions, judges=judges)


def refuse_unsuited(config: Any, past_key_values: Cache | None, kwargs: dict[str, Any]) -> None:
    """Refuse what cannot be had where layers have different numbers of rows.

    Raises:
        ValueError: a cache of fixed size, or attention weights.
    """
    if past_key_values is not None and past_key_values.is_compileable:
        raise ValueError(
            f"a {type(past_key_values).__name__} has one length for all layers, but token "
            "reduction leaves them different numbers of rows: leave cache_implementation out, or "
            "use 'dynamic'"
        )
    wanted = kwargs.get("output_attentions")
    if getattr(config, "output_attentions", False) if wanted is None else wanted:
        raise ValueError(
            "output_attentions=True cannot go with token reduction, under which layers differ in "
            "their rows: set it to false, or reduction to null"
        )
