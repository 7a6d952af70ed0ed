"""The paper's prefill figures, and how its FLOPs column is reproduced.

Five crops of 576 tokens and 50 text tokens, eager attention, one H100 (its table of six LLMs).
Under ``paper_flops`` with ``fused_qkv`` for the two models that have one matrix for query, key and
value, Phi-3 and InternLM2.5, all twelve figures come out within 1 point. Counted once, three do
not: Phi-3 L16 gives 36.7 (paper 35), InternLM2.5 L16 gives 42.1 (39) and L20 gives 31.6 (30).

Source: paper, table of results with different LLMs, and tables 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxyv.model.flops import RowTokens

__all__ = ["FUSED_QKV", "PAPER", "PAPER_REDUCTIONS", "PAPER_ROW", "PAPER_SKIPS", "PaperFigures"]

PAPER_ROW = RowTokens(crops=5, text=50)
FUSED_QKV = ("phi3-3b", "internlm2.5-7b")
"""Presets whose original code has one projection to query, key and value."""


@dataclass(frozen=True)
class PaperFigures:
    """Savings in percent that the paper states, against its own baseline.

    Attributes:
        flops: of the prefill.
        time: of the prefill; None where the paper does not say it.
    """

    flops: int
    time: int | None = None


PAPER: dict[str, dict[int, PaperFigures]] = {
    "vicuna-7b": {12: PaperFigures(46, 41), 16: PaperFigures(36, 31)},
    "vicuna-13b": {16: PaperFigures(43, 40), 20: PaperFigures(36, 33)},
    "llama3-8b": {16: PaperFigures(42, 34), 20: PaperFigures(32, 25)},
    "qwen2-7b": {16: PaperFigures(37, 29), 20: PaperFigures(25, 14)},
    "phi3-3b": {16: PaperFigures(35, 34), 20: PaperFigures(27, 25)},
    "internlm2.5-7b": {16: PaperFigures(39, 33), 20: PaperFigures(30, 24)},
}
"""By preset and start layer."""

PAPER_SKIPS: dict[str, dict[int, PaperFigures]] = {
    "atn": {0: PaperFigures(18, 60), 12: PaperFigures(11, 40), 16: PaperFigures(9, 32)},
    "atn_ffn": {0: PaperFigures(80), 12: PaperFigures(50), 16: PaperFigures(40)},
}
"""Vicuna-7B whose vision tokens skip attention, or attention and FFN, by first such layer."""

_VISIONZIP: dict[str, object] = {
    "method": "visionzip",
    "dominant": 360,
    "contextual": 40,
    "include_class": True,
}
_PYRAMIDDROP: dict[str, object] = {
    "method": "pyramiddrop",
    "layers": (12, 20, 26),
    "ratios": (0.5, 0.25, 0.125),
}
PAPER_REDUCTIONS: list[tuple[dict[str, object], int | None, PaperFigures]] = [
    (_VISIONZIP, None, PaperFigures(32, 40)),
    (_VISIONZIP, 12, PaperFigures(62)),
    (_PYRAMIDDROP, None, PaperFigures(42, 46)),
]
"""Vicuna-7B with token reduction: options, start layer of the ProxyV layers if any, savings.

The paper does not print its settings; these are those that give its FLOPs (docs/decisions.md).
"""
