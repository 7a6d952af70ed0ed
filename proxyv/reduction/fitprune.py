"""FitPrune: drop a calibrated number of image tokens after each layer.

A token's score is the attention that text pays to it times the attention that image tokens pay to
it. How many go after which layer is found once, on a few samples, see ``fitprune_calibration``.

Source: FitPrune (AAAI 2025), section 3, and its published code. Differs: rows leave after the
    layer that scores them, not between its attention and its MLP: the same numbers, that
    layer's MLP runs on them once more; nothing leaves after the last layer; counts scale with the
    sample's tokens; attention maps are summed block by block and never held.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from proxyv.reduction.attention import attention_rows
from proxyv.reduction.base import DecoderReduction, Drop, require_int
from proxyv.reduction.rows import Rows

__all__ = ["FitPrune", "head_max_sums"]


@dataclass(frozen=True)
class FitPrune(DecoderReduction):
    """FitPrune with its options.

    Args:
        scheme: tokens that go after each layer, one number for every layer.
        calibrated_tokens: image tokens of a sample that the scheme was made for; counts of other
            samples scale with theirs. None takes the counts as they are.

    Raises:
        ValueError: an option outside its range.
    """

    scheme: tuple[int, ...]
    calibrated_tokens: int | None = 576
    name: ClassVar[str] = "fitprune"
    all_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", tuple(self.scheme))
        for count in self.scheme:
            require_int("each of fitprune.scheme", count, 0)
        tokens = self.calibrated_tokens
        if tokens is not None:
            require_int("fitprune.calibrated_tokens", tokens, 1)
            if sum(self.scheme) > tokens:
                raise ValueError(
                    f"fitprune.scheme removes {sum(self.scheme)} tokens, but "
                    f"fitprune.calibrated_tokens={tokens}: at most all can go"
                )

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """A drop behind each layer that loses tokens.

        Raises:
            ValueError: a scheme for another depth.
        """
        if len(self.scheme) != num_layers:
            raise ValueError(
                f"fitprune.scheme has {len(self.scheme)} numbers, but the language model has "
                f"{num_layers} layers: calibrate it for this model"
            )
        return tuple(Drop(layer, layer + 1) for layer in self._losing())

    def _losing(self) -> list[int]:
        return [layer for layer, count in enumerate(self.scheme[:-1]) if count]

    def keep_counts(self, number: int, rows: Rows) -> Tensor:
        """(B,) what the scheme leaves up to here; what goes is rounded down."""
        gone = list(accumulate(self.scheme))[self._losing()[number]]
        if self.calibrated_tokens is None:
            return (rows.num_image - gone).clamp(min=0)
        removed = torch.div(rows.num_image * gone, self.calibrated_tokens, rounding_mode="floor")
        return rows.num_image - removed

    def scores(self, query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
        """Attention from text times attention from image tokens."""
        from_text, from_image = head_max_sums(query, key, rows, scaling)
        return from_text * from_image


def head_max_sums(
    query: Tensor, key: Tensor, rows: Rows, scaling: float, block: int = 256
) -> tuple[Tensor, Tensor]:
    """How much each row is attended to, by text after the images and by image tokens.

    Of every pair of rows the head that attends most counts. Text behind the last judging row, an
    answer that is read again, does not count.

    Args:
        query: (B, H, S, h).
        key: (B, K, S, h).
        rows: what the rows are.
        scaling: factor of the scores.
        block: queries whose attention is held at a time.

    Returns:
        (B, S) sums over text rows, and over image rows; float32.
    """
    B, S = rows.valid.shape
    numbers = torch.arange(S, device=query.device)
    behind = rows.image.int().flip(1).cumsum(dim=1).flip(1) == 0
    last = rows.queries.masked_fill(~rows.queries_valid, -1).amax(dim=1, keepdim=True)
    text = rows.text & behind & (numbers <= last)
    askers = torch.stack([text, rows.image], dim=1).float()  # (B, 2, S)
    sums = query.new_zeros(B, 2, S, dtype=torch.float32)
    for part in numbers.split(block):
        visible = (numbers <= part[:, None]) & rows.valid[:, None]
        attention = attention_rows(query[:, :, part], key, scaling, visible)
        sums += askers[:, :, part] @ attention.amax(dim=1)
    return sums[:, 0], sums[:, 1]
