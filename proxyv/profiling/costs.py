"""FLOPs of what the arms do, and the table of FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxyv.config import ProxyVConfig
from proxyv.model.flops import RowTokens, paper_flops, run_flops
from proxyv.profiling.paper import (
    FUSED_QKV,
    PAPER,
    PAPER_REDUCTIONS,
    PAPER_ROW,
    PAPER_SKIPS,
    PaperFigures,
)
from proxyv.profiling.report import Plot, Report
from proxyv.profiling.shapes import arm_name, check_kept, describe_methods, further_arms, with_start

__all__ = ["decoder_flops", "flops_report"]


def decoder_flops(config: ProxyVConfig, row: RowTokens, causal: bool, folded: bool) -> int:
    """FLOPs of the decoder layers as they run, without tower, projector and head."""
    parts = run_flops(config, row, causal=causal, folded=folded)
    return parts["language_model"] + parts["proxyv"]


def flops_report(
    models: Sequence[tuple[str, ProxyVConfig, Sequence[int]]],
    row: RowTokens,
    causal: bool,
    options: dict[str, Any],
    skips: Sequence[str] = (),
    reductions: Sequence[dict[str, Any]] = (),
) -> Report:
    """FLOPs of a prefill, in the paper's convention and as our code runs.

    Args:
        models: name, configuration and start layers of each.
        row: what is read.
        causal: causal attention is counted once, as fused kernels compute it.
        options: other fields of ``ProxyVConfig``.
        skips: what vision tokens skip in further arms, "atn" or "atn_ffn".
        reductions: token-reduction methods of further arms, alone and with ProxyV layers.
    """
    rows: list[dict[str, Any]] = []
    stated = (row.crops, row.text) == (PAPER_ROW.crops, PAPER_ROW.text)
    for name, config, starts in models:
        fused = name in FUSED_QKV or config.text_config.model_type == "phi3"
        base: tuple[int, int] | None = None
        arms = [with_start(config, start, **options) for start in (None, *starts)]
        for chosen in [*arms, *further_arms(arms[0], starts, skips, reductions)]:
            check_kept(chosen, row.kept)
            counts = (
                paper_flops(chosen, row, fused_qkv=fused),
                decoder_flops(chosen, row, causal, folded=True),
            )
            base = base or counts
            saved = [100 * (1 - count / whole) for count, whole in zip(counts, base, strict=True)]
            figures = _stated(name, chosen) if stated else None
            rows.append(
                {
                    "model": name,
                    "arm": arm_name(chosen, learned=True),
                    "TFLOPs, paper's count": counts[0] / 1e12,
                    "saved %": saved[0],
                    "paper says %": figures.flops if figures else None,
                    "TFLOPs as run": counts[1] / 1e12,
                    "saved as run %": saved[1],
                }
            )
    proxied = [line for line in rows if line["arm"] != "baseline"]
    names = [f"{line['model']} {line['arm'].removeprefix('ProxyV-')}" for line in proxied]
    series = {
        "paper's count": [line["saved %"] for line in proxied],
        "as run": [line["saved as run %"] for line in proxied],
    }
    if stated and all(line["paper says %"] is not None for line in proxied):
        series["paper's figure"] = [line["paper says %"] for line in proxied]
    attention = "causal attention once" if causal else "attention as S x S"
    return Report(
        name="flops",
        title=f"FLOPs of a prefill: {row.crops} crops, {row.text} text tokens",
        rows=rows,
        notes="Decoder layers only. Paper's count: attention as S x S, guided updates unfolded, "
        "last layer like the others, a fused projection to query, key and value counted twice "
        f"(Phi-3, InternLM2.5). As run: {attention}, folded, last layer without updates; crops "
        "are taken to lose tokens alike." + describe_methods(reductions, row.kept),
        plot=Plot(x=names, series=series, y_label="FLOPs saved, %"),
    )


def _stated(name: str, config: ProxyVConfig) -> PaperFigures | None:
    """What the paper says of a model, None where it says nothing."""
    start, method = config.start_layer, config.reduction_method
    if method is not None:
        known = [] if name != "vicuna-7b" else PAPER_REDUCTIONS
        asked = (method.options(), start)
        return next((figures for *about, figures in known if tuple(about) == asked), None)
    if start is None or config.proxy_kind != "spatial":
        return None
    if config.skip is None:
        return PAPER.get(name, {}).get(start)
    return PAPER_SKIPS[config.skip].get(start) if name == "vicuna-7b" else None
