"""What the paper reports, to stand beside our rows.

Source: paper, tables of results with different LLMs, of the redundancy study and of token
reduction; FLOPs and times of ProxyV and of skipping are in ``proxyv/profiling/paper.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxyv.profiling.paper import PAPER, PAPER_SKIPS

__all__ = ["BASELINE", "LLMS", "MASKED", "ROWS", "LlmRow", "PaperRow"]

BASELINE = 54.64
"""Score_fine of Vicuna-7B without ProxyV."""


@dataclass(frozen=True)
class PaperRow:
    """A row on Vicuna-7B.

    Attributes:
        relative: Score_fine in percent of the baseline's.
        score: Score_fine; None where the paper gives the relative score only.
        flops: saved, percent; None for the baseline.
        time: saved, percent; None where the paper does not say it.
    """

    relative: float
    score: float | None = None
    flops: int | None = None
    time: int | None = None


def _scored(score: float, flops: int | None = None, time: int | None = None) -> PaperRow:
    return PaperRow(100 * score / BASELINE, score, flops, time)


def _skipped(kind: str, layer: int, relative: float) -> PaperRow:
    figures = PAPER_SKIPS[kind][layer]
    return PaperRow(relative, flops=figures.flops, time=figures.time)


_EARLY, _LATE = PAPER["vicuna-7b"][12], PAPER["vicuna-7b"][16]

ROWS: dict[str, PaperRow] = {
    "baseline": _scored(BASELINE),
    "proxyv-early": _scored(55.16, _EARLY.flops, _EARLY.time),
    "proxyv-late": _scored(55.94, _LATE.flops, _LATE.time),
    "visionzip": _scored(54.58, 32, 40),
    "pyramiddrop": _scored(54.63, 42, 46),
    "atn-early": _skipped("atn", 12, 99.3),
    "atn-late": _skipped("atn", 16, 99.9),
    "atn-ffn-early": _skipped("atn_ffn", 12, 99.3),
    "atn-ffn-late": _skipped("atn_ffn", 16, 100.4),
}
"""By what an arm of a preset names as ``paper``."""


MASKED = {0.5: 100.2, 0.625: 94.5, 1.0: 62.7}
"""Score in percent of the baseline's by the share of layers, from the last one backwards, in which
vision tokens do not see each other; nothing trained (the study's start layers 16, 12 and 0)."""


@dataclass(frozen=True)
class LlmRow:
    """Score_fine of a language model: baseline, first and second start layer."""

    name: str
    baseline: float
    early_layer: int
    early: float
    late_layer: int
    late: float


LLMS = (
    LlmRow("Vicuna-7B", BASELINE, 12, 55.16, 16, 55.94),
    LlmRow("Vicuna-13B", 58.58, 16, 58.95, 20, 59.22),
    LlmRow("Llama3-8B", 56.60, 16, 56.87, 20, 57.49),
    LlmRow("Qwen2-7B", 60.15, 16, 60.55, 20, 61.44),
    LlmRow("Phi3-3B", 49.89, 16, 50.28, 20, 50.72),
    LlmRow("InternLM2.5-7B", 58.33, 16, 58.68, 20, 59.08),
)
