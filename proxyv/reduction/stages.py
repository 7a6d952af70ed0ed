"""What a language model whose rows become fewer knows of its layers: stages, each with own rows.

A stage is the layers between two drops. The cache of a layer holds the rows of its stage, and what
decoding has to know about the stages lies on the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from proxyv.model.window import past_length
from proxyv.reduction.base import DecoderReduction

__all__ = [
    "StageState",
    "layer_stages",
    "note_stages",
    "rows_read",
    "run_layer",
    "stage_mask",
    "stages_of",
]


@dataclass(frozen=True)
class StageState:
    """What a cache has to know of one stage: layers between two drops.

    Attributes:
        valid: (B, K) which cached rows of these layers are real.
        shift: (B, 1) what to take from a position of the whole sequence.
    """

    valid: Tensor
    shift: Tensor

    def change(self, change: Callable[[Tensor], Tensor]) -> StageState:
        """The same of other samples: ``change`` takes (B, ...) to (B', ...)."""
        return StageState(change(self.valid), change(self.shift))


def stages_of(past_key_values: Cache | None) -> tuple[StageState, ...] | None:
    """The stages of a cache that a reduced prompt was read into; None for any other."""
    return getattr(past_key_values, "proxyv_stages", None)


def rows_read(past_key_values: Cache | None) -> int | None:
    """Rows of the whole sequence that such a cache stands for, padding included; else None.

    They follow from what the cache holds now, which may be less than was read into it:
    generation with guessed tokens crops those that were wrong.
    """
    left_out = getattr(past_key_values, "proxyv_left_out", None)
    return None if left_out is None else past_length(past_key_values) + left_out


def layer_stages(method: DecoderReduction | None, num_layers: int) -> list[int]:
    """The stage of each layer: how many drops come before it."""
    drops = () if method is None else method.drops(num_layers)
    return [sum(drop.before <= layer for drop in drops) for layer in range(num_layers)]


def note_stages(
    past_key_values: Cache | None, stages: Sequence[StageState], num_rows: int | None = None
) -> None:
    """Write on a cache what decoding will ask for.

    Args:
        past_key_values: the cache, after the rows were read into it.
        stages: of its layers.
        num_rows: rows of the prompt, some of which the first layer may not hold; None behind it.
    """
    if past_key_values is None:
        return
    past_key_values.proxyv_stages = tuple(stages)  # type: ignore[attr-defined]
    if num_rows is not None:
        left_out = num_rows - past_length(past_key_values)
        past_key_values.proxyv_left_out = left_out  # type: ignore[attr-defined]


def stage_mask(
    model: Any, hidden: Tensor, valid: Tensor, past_key_values: Cache | None, index: int
) -> Any:
    """The attention function's own kind of mask; positions with gaps are no packed samples."""
    return create_causal_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=past_key_values,
        position_ids=None,
        layer_idx=index,
    )


def run_layer(
    layer: Any,
    hidden: Tensor,
    mask: Any,
    positions: Tensor,
    rope: tuple[Tensor, Tensor],
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Run an ordinary layer on natural rows: (B, S', D) to (B, S', D)."""
    return layer(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=rope,
        past_key_values=past_key_values,
        use_cache=past_key_values is not None,
        **kwargs,
    )
