"""The measurements: latency, memory, scaling and breakdown, all arms in turn in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from proxyv.model.flops import RowTokens, kv_cache_bytes
from proxyv.profiling.arms import Arm, Inputs, make_inputs
from proxyv.profiling.breakdown import PARTS, breakdown
from proxyv.profiling.costs import decoder_flops
from proxyv.profiling.measure import Timing, peak_memory, time_interleaved
from proxyv.profiling.notes import methods_note, setting_of, shape_of, times_note, training_note
from proxyv.profiling.report import Plot, Report
from proxyv.profiling.shapes import check_kept

__all__ = [
    "OPERATIONS",
    "Rounds",
    "breakdown_report",
    "latency_report",
    "memory_report",
    "scaling_report",
]

OPERATIONS = ("prefill", "decode", "answer", "training")
STOCK_CACHE = "baseline, stock cache"
Works = dict[str, Callable[[], Any]]
_MIB = 1 << 20


class Rounds(NamedTuple):
    """How often all arms take their turn.

    Attributes:
        repeats: measured rounds.
        warmup: rounds before them.
    """

    repeats: int
    warmup: int = 1


def latency_report(
    arms: Sequence[Arm],
    row: RowTokens,
    batch: int,
    rounds: Rounds,
    operations: Sequence[str],
    tokens: int,
    checkpointing: bool = False,
) -> Report:
    """Time of a prefill, a decoding step, a whole answer and a training step.

    Args:
        arms: the baseline first.
        row: what each row of the batch holds.
        batch: rows.
        rounds: how often; a decoding step is short and gets five times as many.
        operations: which of ``OPERATIONS``.
        tokens: of the whole answer.
        checkpointing: with gradient checkpointing.
    """
    inputs, device, causal = _setting(arms, row, batch)
    measured: dict[str, dict[str, Timing]] = {}
    for arm in arms:
        arm.inference()
    if "prefill" in operations:
        works: Works = {arm.name: partial(arm.prefill, inputs[arm.name]) for arm in arms}
        measured["prefill"] = time_interleaved(works, device, *rounds)
    if "decode" in operations:
        caches = {arm.name: arm.prefill(inputs[arm.name]) for arm in arms}
        works = {arm.name: partial(arm.decode, inputs[arm.name], caches[arm.name]) for arm in arms}
        base = arms[0]
        caches[STOCK_CACHE] = base.prefill(inputs[base.name], stock=True)
        works[STOCK_CACHE] = partial(base.decode, inputs[base.name], caches[STOCK_CACHE])
        many = Rounds(5 * rounds.repeats, 5 * rounds.warmup)
        measured["decode step"] = time_interleaved(works, device, *many)  # all caches grow alike
        del works
        caches.clear()
    if "answer" in operations:
        works = {arm.name: partial(arm.answer, inputs[arm.name], tokens) for arm in arms}
        measured["answer"] = time_interleaved(works, device, *rounds)
    if "training" in operations:
        measured["training step"] = _time_training(arms, inputs, device, rounds, checkpointing)
    flops = {arm.name: _operation_flops(arm, row, causal, tokens, checkpointing) for arm in arms}
    flops[STOCK_CACHE] = flops[arms[0].name]
    rows = [
        line
        for operation, timings in measured.items()
        for line in _timed_rows(operation, timings, {n: f[operation] for n, f in flops.items()})
    ]
    found = {(line["arm"], line["operation"]): line["time ratio"] for line in rows}
    names = [
        n for n in dict.fromkeys(n for n, _ in found) if all((n, o) in found for o in measured)
    ]
    notes = times_note(arms, row)
    if "decode step" in measured:
        notes += " The cache of every arm grows in place, but for the stock cache."
    if "answer" in measured:
        notes += f" Answer: prefill and {tokens} tokens."
    if "training step" in measured:
        notes += training_note(checkpointing)
    return Report(
        name="latency",
        title=f"Latency: {setting_of(arms[0], inputs[arms[0].name])}",
        rows=rows,
        notes=notes,
        plot=Plot(
            x=names,
            series={operation: [found[n, operation] for n in names] for operation in measured},
            y_label="time / baseline's time",
        ),
    )


def memory_report(
    arms: Sequence[Arm],
    row: RowTokens,
    batch: int,
    operations: Sequence[str],
    checkpointing: bool = False,
) -> Report:
    """Peak memory above the weights, and the cache; arguments as of ``latency_report``."""
    inputs, device, _ = _setting(arms, row, batch)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        arm.inference()
        kept = [*arm.model.parameters(), *arm.model.buffers()]
        weights = sum(tensor.nbytes for tensor in kept)
        found: dict[str, int] = {}
        if "prefill" in operations:
            arm.prefill(inputs[arm.name])  # what is made once and kept belongs to no peak
            found["prefill"] = peak_memory(partial(arm.prefill, inputs[arm.name]), device)
        if "training" in operations:
            arm.training(checkpointing)
            found["training"] = peak_memory(partial(arm.train_step, inputs[arm.name]), device)
            arm.forget_gradients()
        size = inputs[arm.name].rows.element_size()
        cached = batch * kv_cache_bytes(arm.config, row, size)
        line: dict[str, Any] = {"arm": arm.name, "weights MiB": weights / _MIB}
        line["KV cache MiB"] = cached / _MIB
        for operation, peak in found.items():
            line[f"{operation} peak MiB"] = peak / _MIB
            first = rows[0] if rows else line
            line[f"{operation} ratio"] = peak / _MIB / first[f"{operation} peak MiB"]
        rows.append(line)
    done = [name for name in ("prefill", "training") if f"{name} ratio" in rows[0]]
    return Report(
        name="memory",
        title=f"Memory: {setting_of(arms[0], inputs[arms[0].name])}",
        rows=rows,
        notes="Weights: with what is folded from them for inference. Peak above weights; prefill "
        "includes the cache, training the gradients"
        + (", with gradient checkpointing." if checkpointing else ".")
        + methods_note(arms, row),
        plot=Plot(
            x=[line["arm"] for line in rows],
            series={name: [line[f"{name} peak MiB"] for line in rows] for name in done},
            y_label="peak above weights, MiB",
        ),
    )


def scaling_report(
    arms: Sequence[Arm],
    rows: Sequence[RowTokens],
    batch: int,
    rounds: Rounds,
    memory: bool = True,
) -> Report:
    """Prefill by number of crops and text tokens; other arguments as of ``latency_report``.

    Args:
        arms: the baseline first.
        rows: what a row of the batch holds, one measurement each; crops vary fastest.
        batch: rows of a batch.
        rounds: how often.
        memory: measure the peak too, in what is then the first round of warming up.
    """
    lines: list[dict[str, Any]] = []
    for arm in arms:
        arm.inference()
    for row in rows:
        inputs, device, causal = _setting(arms, row, batch)
        works = {arm.name: partial(arm.prefill, inputs[arm.name]) for arm in arms}
        peaks = {n: peak_memory(work, device) for n, work in works.items()} if memory else {}
        warmup = rounds.warmup - 1 if peaks and rounds.warmup else rounds.warmup
        timings = time_interleaved(works, device, rounds.repeats, warmup)
        flops = {arm.name: decoder_flops(arm.config, row, causal, True) for arm in arms}
        size = inputs[arms[0].name].rows.element_size()
        for arm, line in zip(arms, _timed_rows("prefill", timings, flops), strict=True):
            line["KV cache MiB"] = batch * kv_cache_bytes(arm.config, row, size) / _MIB
            if peaks:
                line["peak MiB"] = peaks[arm.name] / _MIB
            lines.append({"crops": row.crops, "text": row.text, **line})
    return Report(
        name="scaling",
        title=f"Prefill by crops and text: {shape_of(arms[0])}",
        rows=lines,
        notes=times_note(arms, rows[0])
        + (" Peak above weights, cache included." if memory else ""),
        plot=_scaling_plot(lines),
    )


def _scaling_plot(lines: Sequence[Mapping[str, Any]]) -> Plot:
    """Times over what varies: crops, else text tokens, else nothing, which gives bars."""
    sizes = {key: list(dict.fromkeys(line[key] for line in lines)) for key in ("crops", "text")}
    varied = [key for key, found in sizes.items() if len(found) > 1]
    over = varied[0] if varied else "arm"
    series: dict[str, list[float]] = {}
    for line in lines:
        name = line["arm"] if varied else "prefill"
        if len(varied) > 1:
            name += f", {line['text']} text tokens"
        series.setdefault(name, []).append(line["median ms"] / 1000)
    return Plot(
        x=list(dict.fromkeys(line[over] for line in lines)),
        series=series,
        y_label="prefill, seconds",
        x_label={"crops": "crops", "text": "text tokens", "arm": ""}[over],
        lines=bool(varied),
    )


def breakdown_report(arms: Sequence[Arm], row: RowTokens, batch: int, repeats: int) -> Report:
    """Share of a layer's time by part; arguments as of ``latency_report``."""
    inputs, device, _ = _setting(arms, row, batch)
    for arm in arms:
        arm.inference()
    turns = [
        {arm.name: breakdown(arm, inputs[arm.name], device) for arm in arms}
        for _ in range(1 + repeats)
    ][1:]  # the first warms up
    found = {
        arm.name: {part: median(turn[arm.name][part] for turn in turns) for part in PARTS}
        for arm in arms
    }
    first = sum(found[arms[0].name].values())
    rows = []
    for name, parts in found.items():
        whole = sum(parts.values())
        shares = {f"{part} %": 100 * seconds / whole for part, seconds in parts.items()}
        layer = "ordinary" if name == arms[0].name else "ProxyV"
        timed = {"layer ms": 1000 * whole, "ratio": whole / first}
        rows.append({"arm": name, "layer": layer, **timed, **shares})
    return Report(
        name="breakdown",
        title=f"A layer in a prefill: {setting_of(arms[0], inputs[arms[0].name])}",
        rows=rows,
        notes="Mean layer, median of the repeats; of ProxyV arms the ProxyV layers but the last. "
        "Rest: rotary positions, cache, splitting and joining, additions; an ordinary layer's "
        "attention holds the first two. Reading the clock costs a little in every part.",
        plot=Plot(
            x=list(found),
            series={p: [1000 * parts[p] for parts in found.values()] for p in PARTS},
            y_label="ms of a layer",
            stacked=True,
        ),
    )


def _setting(
    arms: Sequence[Arm], row: RowTokens, batch: int
) -> tuple[dict[str, Inputs], torch.device, bool]:
    """Each arm's inputs, device, and whether attention without a mask is causal in the kernel."""
    weight = next(arms[0].model.parameters())
    for arm in arms:
        check_kept(arm.config, row.kept)
    inputs = {arm.name: make_inputs(arm.config, row, batch, weight) for arm in arms}
    return inputs, weight.device, arms[0].model.config._attn_implementation != "eager"


def _time_training(
    arms: Sequence[Arm],
    inputs: dict[str, Inputs],
    device: torch.device,
    rounds: Rounds,
    checkpointing: bool,
) -> dict[str, Timing]:
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        arm.training(checkpointing)
    found = time_interleaved(
        {arm.name: partial(arm.train_step, inputs[arm.name]) for arm in arms},
        device,
        *rounds,
        after=lambda name: by_name[name].forget_gradients(),
    )
    for arm in arms:
        arm.inference()
    return found


def _operation_flops(
    arm: Arm, row: RowTokens, causal: bool, tokens: int, checkpointing: bool
) -> dict[str, int]:
    """FLOPs as run; a backward pass costs two forward ones, and checkpointing one more."""
    steps, step = [], row
    for _ in range(tokens):
        step = step.cached()
        steps.append(decoder_flops(arm.config, step, causal, True))
    prefill = decoder_flops(arm.config, row, causal, True)
    forward = decoder_flops(arm.config, row, causal, False)
    return {
        "prefill": prefill,
        "decode step": steps[0],
        "answer": prefill + sum(steps),
        "training step": forward * (4 if checkpointing else 3),
    }


def _timed_rows(
    operation: str, timings: dict[str, Timing], flops: dict[str, int]
) -> list[dict[str, Any]]:
    """One line for each arm; ratios to the first."""
    names = list(timings)
    first = names[0]
    lines = []
    for name in names:
        time_ratio = timings[name].over(timings[first])
        flops_ratio = flops[name] / flops[first]
        lines.append(
            {
                "operation": operation,
                "arm": name,
                "median ms": 1000 * timings[name].median,
                "spread ms": 1000 * timings[name].spread,
                "time ratio": time_ratio,
                "FLOPs ratio": flops_ratio,
                "time saved %": 100 * (1 - time_ratio),
                "FLOPs saved %": 100 * (1 - flops_ratio),
            }
        )
    return lines
