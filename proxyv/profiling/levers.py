"""What each way of saving time is worth: the same prefill with one of them taken away.

Every variant computes the same numbers (up to rounding) as the prefill that has all of them, so
what is measured is the lever alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from proxyv.model.flops import RowTokens
from proxyv.model.guided_update import GuidedUpdate
from proxyv.model.passes import add_to, normalise
from proxyv.model.proxies import add_to_blocks, join_groups, split_groups
from proxyv.model.streams import SplitRows
from proxyv.profiling.arms import Arm, Inputs, make_inputs
from proxyv.profiling.measure import time_interleaved
from proxyv.profiling.report import Plot, Report

__all__ = ["LEVERS", "levers_report"]

ALL = "nothing"


class CopyingCache(DynamicCache):
    """Copies what it is first given, as a stock cache does; ours takes the rows over."""


class WideContext(nn.Module):
    """A guided update whose proxies' half runs at the full tokens' resolution, as the paper's.

    Args:
        update: whose weights it uses, unfolded; of spatial proxies.
    """

    def __init__(self, update: GuidedUpdate) -> None:
        super().__init__()
        self.update = update

    def forward(
        self, full: Tensor, proxies: Tensor, groups: Any, reduce: int, splats: None
    ) -> Tensor:
        """Arguments and result as of ``GuidedUpdate.forward``, without gradients."""
        update = self.update
        parts = split_groups(full, [group.num_full for group in groups])
        asked = split_groups(proxies, [group.num_crops * group.num_proxies for group in groups])
        told = [
            add_to_blocks(torch.zeros_like(part), proxy, group.side, reduce)  # (B, C*s*s, D)
            for part, proxy, group in zip(parts, asked, groups, strict=True)
        ]
        hidden = update.merge_input(update.input_proj(full))
        hidden = hidden + update.merge_context(update.context_proj(join_groups(told)))
        hidden = nn.functional.silu(hidden, inplace=True)
        return normalise(update.norm, add_to(update.output_proj(hidden), full))


def _updates(arm: Arm) -> list[tuple[Any, GuidedUpdate]]:
    layers = [layer for layer in arm.model.layers if hasattr(layer, "guided_update")]
    return [(layer, layer.guided_update) for layer in layers if not layer.is_last]


def _without_folding(arm: Arm, inputs: Inputs) -> Cache:
    held = [(update, update.fused_input, update.fused_context) for _, update in _updates(arm)]
    for update, _, _ in held:
        update.unfuse()
    try:
        return arm.prefill(inputs)
    finally:
        for update, told, context in held:
            update.fused_input, update.fused_context = told, context


def _with_wide_context(arm: Arm, inputs: Inputs) -> Cache:
    held = _updates(arm)
    for layer, update in held:
        layer.guided_update = WideContext(update)
    try:
        return arm.prefill(inputs)
    finally:
        for layer, update in held:
            layer.guided_update = update


@torch.enable_grad()
def _without_writing_over(arm: Arm, inputs: Inputs) -> Cache:
    cache = DynamicCache(config=arm.model.config)
    arm.read(inputs, past_key_values=cache, use_cache=True)  # no weight wants a gradient
    return cache


@torch.no_grad()
def _with_copied_cache(arm: Arm, inputs: Inputs) -> Cache:
    cache = CopyingCache(config=arm.model.config)
    arm.read(inputs, past_key_values=cache, use_cache=True)
    return cache


def _with_joined_streams(arm: Arm, inputs: Inputs) -> Cache:
    hooks = [layer.register_forward_hook(_join_and_split, with_kwargs=True) for layer, _ in
             _updates(arm)]  # fmt: skip
    try:
        return arm.prefill(inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _join_and_split(
    _: nn.Module, args: Any, kwargs: dict[str, Any], output: SplitRows
) -> SplitRows:
    """What a layer would hand on if every layer took and gave natural rows."""
    layout = kwargs["streams"].layout
    num_proxies = output.main.shape[1] - layout.light_index.shape[1]
    light, full = layout.split(layout.join(output.main[:, num_proxies:], output.full))
    main = torch.cat([output.main[:, :num_proxies], light], dim=1)
    return output._replace(main=main, full=full)


@torch.no_grad()
def _stock_with_mask(arm: Arm, inputs: Inputs) -> Cache:
    """The stock model as it runs where the rows' mask is written out, (B, 1, S, S)."""
    rows, cache = inputs.rows, DynamicCache(config=arm.model.config)
    lowest = torch.finfo(rows.dtype).min
    mask = rows.new_full((rows.shape[1], rows.shape[1]), lowest).triu(1)[None, None]
    mask = mask.expand(rows.shape[0], -1, -1, -1)
    arm.model(inputs_embeds=rows, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


LEVERS: dict[str, Callable[[Arm, Inputs], Cache]] = {
    "guided updates folded": _without_folding,
    "folded, and context at proxy resolution": _with_wide_context,
    "written over in place": _without_writing_over,
    "cache takes rows over": _with_copied_cache,
    "streams split and joined once": _with_joined_streams,
}
"""A prefill without the lever, by the lever's name."""


def levers_report(arms: list[Arm], row: RowTokens, batch: int, repeats: int) -> Report:
    """Time of a ProxyV prefill without each lever, interleaved.

    Args:
        arms: the baseline and one ProxyV decoder of spatial proxies. Their weights will not want
            gradients any more.
        row: what each row of the batch holds.
        batch: rows.
        repeats: measured rounds, after one to warm up.

    Raises:
        ValueError: another number of arms.
    """
    if len(arms) != 2:
        raise ValueError(
            f"levers compares the baseline with one ProxyV model, got {len(arms) - 1}: give one "
            "layer in --start-layers and no --skip"
        )
    for arm in arms:
        arm.inference()
        arm.model.requires_grad_(False)
    base, arm = arms
    weight = next(arm.model.parameters())
    inputs = make_inputs(arm.config, row, batch, weight)
    works: dict[str, Callable[[], Any]] = {
        "stock model": partial(base.prefill, inputs),
        "stock model, with an S x S mask": partial(_stock_with_mask, base, inputs),
        ALL: partial(arm.prefill, inputs),
    }
    works |= {name: partial(work, arm, inputs) for name, work in LEVERS.items()}
    timings = time_interleaved(works, weight.device, repeats)
    rows: list[dict[str, Any]] = [
        {
            "without": name,
            "median ms": 1000 * timing.median,
            "spread ms": 1000 * timing.spread,
            "time ratio": timing.over(timings[ALL]),
            "of the stock model's": timing.over(timings["stock model"]),
        }
        for name, timing in timings.items()
    ]
    return Report(
        name="levers",
        title=f"{arm.name} prefill without one lever: {row.crops} crops, {row.text} text tokens, "
        f"batch {batch}",
        rows=rows,
        notes="Time ratio: to the same prefill with all levers, median of the rounds' ratios.",
        plot=Plot(
            x=[line["without"] for line in rows[2:]],
            series={arm.name: [line["time ratio"] for line in rows[2:]]},
            y_label="time / time with all levers",
        ),
    )
