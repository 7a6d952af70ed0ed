"""What the paper claims, and the rule by which our results speak to a claim.

A claim compares two arms by a score: the mean of the preset's tasks, or a single task. The gap is
that of the per-question means over the seeds that both arms have. With its 95 % interval (paired
bootstrap over the questions) a claim

* holds where the whole interval, and the gap of every single seed, lie on the claim's side,
* does not hold where both lie on the other side,
* cannot be told otherwise, or where a result is missing.

The line between the sides is 0, or `MARGIN` points below it for "loses nothing". The interval
covers the choice of questions; of the choice of seeds no more is asked than that they agree.

Where the baseline keeps more than `BLIND_SHARE` of a score with the images of other questions, or
was not asked so, no claim about that score can be told: it may not show what a model sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from proxyv.eval.statistics import average_interval, paired_difference
from proxyv.reproduce.plan import Claim, Plan
from proxyv.reproduce.results import Result

__all__ = [
    "BLIND_SHARE",
    "CLAIMS",
    "MARGIN",
    "Gap",
    "Table",
    "blind_share",
    "find_gap",
    "mean_interval",
    "seed_parts",
    "verdict",
]

MARGIN = 1.0
"""Points that an arm may lie below another one and still lose nothing."""

BLIND_SHARE = 0.5
"""Of a score that the baseline keeps without the right images; above it the score says nothing."""

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell"

Table = Mapping[tuple[str, int], Result]
"""Finished results by arm and seed."""


@dataclass(frozen=True)
class Gap:
    """How an arm's score differs from another's, in points.

    Attributes:
        value: of the means over the seeds.
        interval: 95 %, over the questions.
        p_value: of a paired permutation test.
        seeds: gap of every seed that both have.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    seeds: Mapping[int, float]


CLAIMS = (
    Claim("ProxyV from 3/8 of the depth loses nothing against the baseline",
          "55.16, 54.64", "proxyv-early", "baseline", "not worse"),
    Claim("ProxyV from 3/8 loses nothing where stage 2 is twice as long for both",
          "–", "proxyv-early-long", "baseline-long", "not worse"),
    Claim("ProxyV from 3/8 of the depth is better than the baseline",
          "55.16, 54.64", "proxyv-early", "baseline", "better"),
    Claim("ProxyV from half of the depth loses nothing against the baseline",
          "55.94, 54.64", "proxyv-late", "baseline", "not worse"),
    Claim("ProxyV from half of the depth is better than the baseline",
          "55.94, 54.64", "proxyv-late", "baseline", "better"),
    Claim("ProxyV from half of the depth is better than from 3/8",
          "55.94, 55.16", "proxyv-late", "proxyv-early", "better"),
    Claim("ProxyV is better than VisionZip used without training",
          "55.16, 54.58", "proxyv-early", "visionzip", "better"),
    Claim("ProxyV is better than PyramidDrop used without training",
          "55.16, 54.63", "proxyv-early", "pyramiddrop", "better"),
    Claim("ProxyV is better than VisionZip that stage 2 was trained with",
          "–", "proxyv-early", "visionzip-trained", "better"),
    Claim("ProxyV is better than PyramidDrop that stage 2 was trained with",
          "–", "proxyv-early", "pyramiddrop-trained", "better"),
    Claim("ProxyV loses nothing in grounding",
          "84.41, 82.96 by overlap", "proxyv-early", "baseline", "not worse", "refcoco_testA"),
    Claim("VisionZip loses in grounding",
          "79.11, 82.96 by overlap", "visionzip", "baseline", "worse", "refcoco_testA"),
    Claim("PyramidDrop loses in grounding",
          "80.75, 82.96 by overlap", "pyramiddrop", "baseline", "worse", "refcoco_testA"),
    Claim("ProxyV loses nothing in page parsing",
          "BLEU 79.23, 79.91; 1 - distance 84.34, 84.49",
          "proxyv-early", "baseline", "not worse", "ccpdf"),
    Claim("VisionZip loses in page parsing",
          "BLEU 72.18, 79.91; 1 - distance 82.66, 84.49",
          "visionzip", "baseline", "worse", "ccpdf"),
    Claim("PyramidDrop loses in page parsing",
          "BLEU 72.61, 79.91; 1 - distance 82.98, 84.49",
          "pyramiddrop", "baseline", "worse", "ccpdf"),
    Claim("Vision tokens can do without attention from 3/8 of the depth on",
          "99.3 % of the baseline", "atn-early", "baseline", "not worse"),
    Claim("Vision tokens can do without attention from half of the depth on",
          "99.9 % of the baseline", "atn-late", "baseline", "not worse"),
    Claim("A small MLP can replace their attention and FFN from 3/8 of the depth on",
          "99.3 % of the baseline", "atn-ffn-early", "baseline", "not worse"),
    Claim("A small MLP can replace their attention and FFN from half of the depth on",
          "100.4 % of the baseline", "atn-ffn-late", "baseline", "not worse"),
)  # fmt: skip


def seed_parts(results: Sequence[Result], task: str) -> list[float]:
    """Mean over seeds of the score of every question of a task.

    Raises:
        ValueError: results of different questions, or one that has none of the task.
    """
    if lacking := [result.path.name for result in results if result.questions(task) is None]:
        raise ValueError(
            f"{task} was not asked in {', '.join(lacking)}: move that away and run its arm again, "
            "or take the task out of the preset's score"
        )
    if len({result.questions(task) for result in results}) != 1:
        files = ", ".join(result.path.name for result in results)
        raise ValueError(f"{task}: {files} were not asked the same questions, or not scored alike")
    parts = [result.parts(task) for result in results]
    return np.mean(np.asarray(parts), axis=0).tolist()


def find_gap(plan: Plan, table: Table, claim: Claim) -> Gap | str:
    """The gap of a claim's arms over the seeds that both have, or why there is none."""
    tasks = [claim.task] if claim.task else list(plan.score)
    seeds = [
        seed for seed in plan.seeds if (claim.arm, seed) in table and (claim.other, seed) in table
    ]
    if not seeds:
        lacking = [arm for arm in (claim.arm, claim.other) if not any(a == arm for a, _ in table)]
        return f"not run: {', '.join(lacking)}" if lacking else "not run with the same seed"
    first, second = ([table[arm, seed] for seed in seeds] for arm in (claim.arm, claim.other))
    everything = [*first, *second]
    for task in tasks:
        if any(result.questions(task) is None for result in everything):
            return f"{task} was not asked"
        if len({result.questions(task) for result in everything}) != 1:
            return f"{task}: not the same questions or measure"
    strata = [[seed_parts(own, task) for task in tasks] for own in (first, second)]
    found = paired_difference(*strata)
    low, high = found.interval
    own_gaps = {
        seed: 100 * float(np.mean([_mean_gap(a, b, task) for task in tasks]))
        for seed, a, b in zip(seeds, first, second, strict=True)
    }
    return Gap(100 * found.value, (100 * low, 100 * high), found.p_value, own_gaps)


def blind_share(plan: Plan, table: Table, tasks: Sequence[str]) -> float | None:
    """What the baseline keeps of a score without the right images; None where that is not known."""
    shares = []
    for arm in plan.arms.values():
        pairs = [
            (table[arm.name, seed], table["baseline", seed])
            for seed in plan.seeds
            if arm.control and (arm.name, seed) in table and ("baseline", seed) in table
        ]
        alike = all(
            None is not blind.questions(task) == seeing.questions(task)
            for blind, seeing in pairs
            for task in tasks
        )
        if arm.checkpoint == "baseline" and pairs and alike:
            blind, seeing = (_mean(results, tasks) for results in zip(*pairs, strict=True))
            shares += [blind / seeing] if seeing else []
    return max(shares, default=None)


def _mean(results: Sequence[Result], tasks: Sequence[str]) -> float:
    return float(np.mean([np.mean(seed_parts(results, task)) for task in tasks]))


def _mean_gap(first: Result, second: Result, task: str) -> float:
    return float(np.mean(np.subtract(first.parts(task), second.parts(task))))  # type: ignore[arg-type]


def verdict(rule: str, gap: Gap | str, blind: float | None) -> str:
    """Whether a claim holds; see the module.

    Args:
        rule: of the claim.
        gap: of its arms.
        blind: see `blind_share`, of the claim's score.
    """
    if isinstance(gap, str) or blind is None or blind > BLIND_SHARE:
        return UNKNOWN
    sign = -1 if rule == "worse" else 1
    shift = MARGIN if rule == "not worse" else 0.0
    values = [sign * value + shift for value in (*gap.interval, *gap.seeds.values())]
    if min(values) > 0:
        return HOLDS
    return FAILS if max(values) < 0 else UNKNOWN


def mean_interval(results: Sequence[Result], tasks: Sequence[str]) -> tuple[float, float, float]:
    """Score in percent of an arm's seeds together, and its 95 % interval."""
    strata = [seed_parts(results, task) for task in tasks]
    low, high = average_interval(strata)
    return 100 * _mean(results, tasks), 100 * low, 100 * high
