"""How sure a score is: bootstrap intervals, and tests of two runs on the same questions.

Both cover the choice of questions only, not the seed of training. A score is given as one list of
parts whose mean it is, or as several lists (benchmarks) whose means are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["SEED", "Difference", "average_interval", "bootstrap_interval", "paired_difference"]

SEED = 0
DRAWS = 2000
FLIPS = 10_000
CHUNK_CELLS = 4_000_000

Parts = Sequence[float]


class Difference(NamedTuple):
    """How a run differs from another one on the same questions.

    Attributes:
        value: score of the first run minus that of the second.
        interval: 95 % bootstrap interval of it, questions drawn in pairs.
        p_value: how often a difference as large would arise if both runs were equally good.
        changed: number of questions (or groups) that the two runs score differently.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    changed: int


def bootstrap_interval(scores: Parts) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean, over samples drawn with replacement.

    The same scores give the same interval.

    Args:
        scores: one score for each sample, at least one.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: there is no score.
    """
    return average_interval([scores])


def average_interval(strata: Sequence[Parts]) -> tuple[float, float]:
    """The same for an average of several means, each resampled by itself.

    Args:
        strata: the scores behind each mean.
    """
    generator = np.random.default_rng(SEED)
    means = [_resampled_means(scores, generator) for scores in strata]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(low), float(high)


def paired_difference(first: Sequence[Parts], second: Sequence[Parts]) -> Difference:
    """Compare two runs question by question.

    The p-value is that of a two-sided permutation test: were both runs equally good, each
    question's two scores could as well be swapped, so swaps are drawn at random 10,000 times.

    Args:
        first: for each benchmark the scores of the first run's questions.
        second: the same questions, in the same order, in the second run.

    Raises:
        ValueError: the numbers of questions differ, or there is none.
    """
    sizes = [(len(a), len(b)) for a, b in zip(first, second, strict=True)]
    if not sizes or any(a != b or not a for a, b in sizes):
        raise ValueError(f"paired runs need the same questions, got {sizes} of them")
    gaps = [np.subtract(a, b, dtype=np.float64) for a, b in zip(first, second, strict=True)]
    value = float(np.mean([gap.mean() for gap in gaps]))
    generator = np.random.default_rng(SEED)
    swapped = np.mean([_swapped_means(gap, generator) for gap in gaps], axis=0)
    tolerance = 1e-12 * max(1.0, abs(value))
    extreme = int((np.abs(swapped) >= abs(value) - tolerance).sum())
    return Difference(
        value,
        average_interval([gap.tolist() for gap in gaps]),
        (extreme + 1) / (FLIPS + 1),
        sum(int(np.count_nonzero(gap)) for gap in gaps),
    )


def _resampled_means(scores: Parts, generator: np.random.Generator) -> np.ndarray:
    """(DRAWS,) means of the scores, drawn with replacement."""
    if not len(scores):
        raise ValueError("an interval needs at least one score, got none")
    values = np.asarray(scores, dtype=np.float64)
    size = len(values)
    return np.array([values[generator.integers(size, size=size)].mean() for _ in range(DRAWS)])


def _swapped_means(gap: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(FLIPS,) means of the differences with random signs; equal scores do not matter."""
    moving = gap[gap != 0]
    if not len(moving):
        return np.zeros(FLIPS)
    sums = []
    rows = max(1, CHUNK_CELLS // len(moving))
    for start in range(0, FLIPS, rows):
        count = min(rows, FLIPS - start)
        signs = 2 * generator.integers(0, 2, size=(count, len(moving)), dtype=np.int8) - 1
        sums.append(signs @ moving)
    return np.concatenate(sums) / len(gap)
