"""Calibrating FitPrune: from attention sums of a few samples to tokens dropped after each layer.

Each layer may lose the tokens that carry at most a share ``alpha`` of the attention that image
tokens get there, from text and from one another; bisection finds an alpha that just meets the
budget.

Source: FitPrune (AAAI 2025), section 3.3, and its published code. Differs: the counts found for a
    sample always meet the budget; tokens that already went count towards a layer's share; the
    sums of real rows only; samples of different length are brought to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxyv.model.reduction_flops import full_tokens
from proxyv.reduction.attention import decoder_heads
from proxyv.reduction.base import require_number
from proxyv.reduction.decoding import run_reduced
from proxyv.reduction.fitprune import FitPrune, head_max_sums
from proxyv.reduction.rows import Rows

__all__ = ["AttentionSums", "calibrate", "counts_for", "read_sums", "saved_share"]

_PRECISION = 0.01  # of the share of attention that is searched for


@dataclass(frozen=True)
class AttentionSums:
    """What one sample's layers pay attention to, without any token dropped.

    Attributes:
        from_text: (layers, n) attention that each of the n image tokens gets from text.
        from_image: (layers, n) what it gets from image tokens.
        num_other: rows of the sample that are no image token.
    """

    from_text: Tensor
    from_image: Tensor
    num_other: int


@torch.no_grad()
def read_sums(model: Any, embeds: Tensor, rows: Rows) -> AttentionSums:
    """Run a language model on one sample and sum up its attention, layer by layer.

    Args:
        model: as ``run_reduced`` takes it.
        embeds: (1, S, D).
        rows: what they are, at least one image token and text behind it.

    Raises:
        ValueError: more than one sample, or one without image tokens or text behind them.
    """
    if embeds.shape[0] != 1 or not rows.image.any() or rows.image[:, rows.valid[0]][:, -1].any():
        raise ValueError(
            f"FitPrune is calibrated on one sample at a time, with image tokens and text behind "
            f"them; got a batch of {embeds.shape[0]} with {int(rows.image.sum())} image tokens"
        )
    rope = model.rotary_emb(embeds, position_ids=rows.positions)
    sums: list[tuple[Tensor, Tensor]] = []

    def record(layer: Any, args: tuple[Any, ...]) -> None:
        query, key = decoder_heads(layer, args[0], rope, None)
        text, image = head_max_sums(query, key, rows, layer.self_attn.scaling)
        sums.append((text[rows.image].cpu(), image[rows.image].cpu()))

    handles = [layer.register_forward_pre_hook(record) for layer in model.layers]
    try:
        run_reduced(model, None, embeds, rows=rows)
    finally:
        for handle in handles:
            handle.remove()
    other = int(rows.valid.sum() - rows.image.sum())
    return AttentionSums(
        torch.stack([text for text, _ in sums]), torch.stack([image for _, image in sums]), other
    )


def counts_for(sums: AttentionSums, alpha: float) -> list[int]:
    """Tokens that go after each layer if each may lose the share ``alpha`` of its attention.

    Per layer and per kind of attention the least attended tokens go first, as long as those left
    keep at least ``1 - alpha`` of the sum; only tokens that both kinds give up go.
    """
    gone = torch.zeros(sums.from_text.shape[1], dtype=torch.bool)
    counts = []
    for text, image in zip(sums.from_text, sums.from_image, strict=True):
        both = _expendable(text, gone, alpha) & _expendable(image, gone, alpha) & ~gone
        counts.append(int(both.sum()))
        gone = gone | both
    return counts


def _expendable(attention: Tensor, gone: Tensor, alpha: float) -> Tensor:
    """Tokens whose attention, the lowest first and with what is gone, is at most a share alpha."""
    values = attention.double()
    order = values.masked_fill(gone, -1).argsort(stable=True)
    total = values[order].cumsum(dim=0)
    return torch.zeros_like(gone).scatter(0, order, total <= alpha * total[-1])


def calibrate(
    samples: Iterable[AttentionSums],
    ratio: float,
    cost: Callable[[Sequence[int]], float],
) -> FitPrune:
    """Find how many tokens go after each layer.

    Args:
        samples: of ``read_sums``.
        ratio: share of the cost that has to be saved.
        cost: of a prompt, given the rows in each layer.

    Returns:
        The method, its scheme averaged over the samples and rounded down.

    Raises:
        ValueError: no samples, or a ratio that cannot be reached because text alone costs more.
    """
    require_number("ratio", ratio, 0, 1)
    samples = list(samples)
    if not samples:
        raise ValueError("FitPrune needs at least one sample to be calibrated on, got none")
    most = max(sums.from_text.shape[1] for sums in samples)
    found = [_cheapest(sums, ratio, cost) for sums in samples]
    scaled = [
        [count * most / sums.from_text.shape[1] for count in counts]
        for counts, sums in zip(found, samples, strict=True)
    ]
    # A hair's breadth keeps whole numbers whole when a sum of fractions falls short of them.
    scheme = [int(sum(layer) / len(scaled) + 1e-9) for layer in zip(*scaled, strict=True)]
    return FitPrune(tuple(scheme), most)


def saved_share(
    method: FitPrune, sums: AttentionSums, cost: Callable[[Sequence[int]], float]
) -> float:
    """Share of the cost that a method saves on a sample, counts rounded as the method does."""
    layers, n = sums.from_text.shape
    left = full_tokens(method, n, layers)
    whole = cost(_rows([0] * layers, sums))
    return 1 - cost([tokens + sums.num_other for tokens in left]) / whole


def _rows(counts: Sequence[int], sums: AttentionSums) -> list[int]:
    """Rows in each layer, where so many image tokens go after each."""
    left, length = [], sums.from_text.shape[1] + sums.num_other
    for count in counts:
        left.append(length)
        length -= count
    return left


def _cheapest(
    sums: AttentionSums, ratio: float, cost: Callable[[Sequence[int]], float]
) -> list[int]:
    """Counts of an alpha that saves enough, where one smaller by ``_PRECISION`` does not."""
    n = sums.from_text.shape[1]

    def spent(counts: Sequence[int]) -> float:
        return cost(_rows(counts, sums))

    whole = spent([0] * len(sums.from_text))
    low, high = 0.0, 1.0
    best = counts_for(sums, high)
    if spent(best) > (1 - ratio) * whole:
        raise ValueError(
            f"ratio={ratio} cannot be saved: dropping all {n} image tokens after the first layer "
            f"saves {1 - spent(best) / whole:.2f}; ask for less"
        )
    while high - low > _PRECISION:
        middle = (low + high) / 2
        counts = counts_for(sums, middle)
        if spent(counts) <= (1 - ratio) * whole:
            high, best = middle, counts
        else:
            low = middle
    return best
