"""Clocks and peak memory, on a GPU and without one."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Timing", "elapsed", "peak_memory", "time_interleaved"]

_CPU = 0  # a device type, in traces


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat.

    Attributes:
        seconds: in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle repeat."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles; of the extremes where there are fewer than four repeats."""
        if len(self.seconds) < 4:
            return max(self.seconds) - min(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def over(self, other: Timing) -> float:
        """The middle one of the rounds' ratios; the two calls of a round ran side by side."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def elapsed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: by CUDA events on a GPU, else by the clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000


def time_interleaved(
    works: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    warmup: int = 1,
    after: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time several calls in turn, so that whatever else the machine does hits all alike.

    Every round begins with the next call, so that none always follows the same other one.

    Args:
        works: calls by name.
        device: that they run on.
        repeats: measured rounds.
        warmup: rounds before them.
        after: called with the name after each call, off the clock.

    Returns:
        Timings by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            took = elapsed(works[name], device)
            if turn >= warmup:
                seconds[name].append(took)
            if after is not None:
                after(name)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that a call held on top of what was held before it.

    A GPU's allocator keeps count. On a CPU torch's profiler reports every allocation; memory that
    libraries take for themselves is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = work()  # noqa: F841 - what it returns is held, as a caller would
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == _CPU
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
