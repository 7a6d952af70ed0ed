"""Where the time of a layer goes, by part, from hooks on its modules."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from proxyv.profiling.arms import Arm, Inputs

__all__ = ["PARTS", "breakdown"]

_MODULES = {
    "q_proj": "projections",
    "k_proj": "projections",
    "v_proj": "projections",
    "qkv_proj": "projections",
    "o_proj": "projections",
    "mlp": "FFN",
    "guided_update": "guided update",
    "light_mlp": "guided update",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
}
PARTS = ("projections", "attention", "FFN", "guided update", "norms", "rest")
"""Rest is rotary positions, the cache, splitting and joining, and additions; in an ordinary layer
rotary positions and the cache belong to attention. The small MLP of a layer that skips counts as
its guided update."""


class _Clock:
    """Collects intervals; on a GPU they are events, read once the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.intervals: list[tuple[str, Any, Any]] = []
        self._open: dict[int, list[Any]] = defaultdict(list)

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, module: nn.Module, part: str) -> list[Any]:
        """Hooks that record every call of a module."""

        def before(called: nn.Module, _: Any) -> None:
            self._open[id(called)].append(self.now())

        def after(called: nn.Module, *_: Any) -> None:
            self.intervals.append((part, self._open[id(called)].pop(), self.now()))

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same function, recorded."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            self.intervals.append((part, started, self.now()))
            return result

        return recorded

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = defaultdict(float)
        for part, start, stop in self.intervals:
            cuda = self.device.type == "cuda"
            found[part] += start.elapsed_time(stop) / 1000 if cuda else stop - start
        self.intervals.clear()
        return found


@contextmanager
def _watched(layers: list[Any], clock: _Clock) -> Iterator[None]:
    handles = []
    for layer in layers:
        handles += clock.watch(layer, "layer")
        for name, module in layer.named_modules():
            if name.count(".") < 2 and name.rpartition(".")[2] in _MODULES:
                handles += clock.watch(module, _MODULES[name.rpartition(".")[2]])
        if hasattr(layer, "_call_attention"):
            layer._call_attention = clock.wrap(layer._call_attention, "attention")
        else:
            handles += clock.watch(layer.self_attn, "self_attn")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            if hasattr(layer, "_call_attention"):
                del layer._call_attention  # the method of the class is back


def breakdown(arm: Arm, inputs: Inputs, device: torch.device) -> dict[str, float]:
    """Mean seconds that one layer of one prefill spends in each part.

    Args:
        arm: of a baseline all layers are looked at; of ProxyV the ProxyV layers but the last,
            which does less.
        inputs: what is read.
        device: that it runs on.

    Returns:
        Seconds by part, in the order of ``PARTS``.

    Raises:
        ValueError: the last layer is the only ProxyV layer.
    """
    start = arm.config.start_layer
    layers = list(arm.model.layers) if start is None else list(arm.model.layers)[start:-1]
    if not layers:
        raise ValueError(
            f"start_layer={start} leaves the last layer as the only ProxyV layer, which updates "
            "no full token: use a smaller one"
        )
    clock = _Clock(device)
    with _watched(layers, clock):
        arm.prefill(inputs)
        found = clock.take()
    if start is None:
        found["attention"] = found["self_attn"] - found["projections"]
    found["rest"] = found["layer"] - sum(found[part] for part in PARTS if part != "rest")
    return {part: found[part] / len(layers) for part in PARTS}
