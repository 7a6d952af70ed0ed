"""What a prefill and a training step cost an arm, beside the baseline of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proxyv import ProxyVForConditionalGeneration
from proxyv.data.templates import IGNORE_INDEX
from proxyv.eval.answerer import Answerer
from proxyv.eval.images import row_images
from proxyv.eval.sources import Rows
from proxyv.model.flops import RowTokens, paper_flops
from proxyv.profiling.costs import decoder_flops
from proxyv.profiling.measure import time_interleaved
from proxyv.profiling.shapes import with_start
from proxyv.study.cost import make_prompt, prefill

__all__ = ["arm_cost", "baseline_config", "page_crops"]


def page_crops(answerer: Answerer, benchmark: Any, rows: Rows, number: int) -> Tensor:
    """Crops of pages that are spread over a benchmark, as many as asked for.

    Returns:
        (number, 3, height, width), in the model's type.
    """
    found: list[Tensor] = []
    for place in range(number):
        index = place * len(rows) // number
        images = [image.load() for image in row_images(benchmark, rows, index)]
        inputs = answerer.processor.image_inputs(images)
        found += [
            pixels[:count]
            for pixels, count in zip(inputs["pixel_values"], inputs["num_crops"], strict=True)
        ]
    return torch.cat(found)[:number].to(answerer.device, answerer.model.dtype)


def arm_cost(
    model: Any, crops: Tensor, cost: Mapping[str, int], dtype: str | None
) -> dict[str, Any]:
    """FLOPs and time of a prefill, and time of a training step.

    The baseline has random weights and takes turns with the model, so that what else the machine
    does hits both.

    Args:
        model: with its method, if any; it is fused afterwards, so it cannot be trained on.
        crops: (C, 3, height, width) what the prompt shows.
        cost: ``text`` tokens, and ``repeats`` of the timing.
        dtype: type that the arm was trained in; None for one without a training step.

    Returns:
        ``flops`` of the decoder layers, in the paper's count and as run, the same of the baseline,
        ``kept`` (mean tokens that are left of a crop, where the image decides; else None), and
        ``prefill_seconds`` and ``step_seconds`` of every round. A step is forward and, but for the
        vision tower, backward of one row with every text token supervised, in bfloat16 by
        autocast where training was, without the optimiser.
    """
    config = model.config
    base = baseline_config(config)
    stock = ProxyVForConditionalGeneration(base).to(model.device, model.dtype).eval()
    stock.set_attn_implementation(config._attn_implementation)
    prompts = {
        name: (own, make_prompt(own, len(crops), cost["text"]) | {"pixel_values": crops[None]})
        for name, own in (("baseline", stock), ("arm", model))
    }
    steps = {} if dtype is None else _time_steps(prompts, cost["repeats"], dtype)
    model.fuse()
    works = {name: partial(prefill, *given) for name, given in prompts.items()}
    timings = time_interleaved(works, model.device, cost["repeats"])
    kept = _tokens_left(model, crops, cost["text"]) if config.image_decides else None
    row = RowTokens(len(crops), cost["text"])
    left = row if kept is None else RowTokens(len(crops), cost["text"], kept=round(kept))
    return {
        "crops": len(crops),
        "text": cost["text"],
        "kept": kept,
        "flops": _flops(config, left),
        "baseline_flops": _flops(base, row),
        "prefill_seconds": [round(s, 6) for s in timings["arm"].seconds],
        "baseline_prefill_seconds": [round(s, 6) for s in timings["baseline"].seconds],
        "step_seconds": steps.get("arm"),
        "baseline_step_seconds": steps.get("baseline"),
    }


def _time_steps(
    prompts: Mapping[str, tuple[Any, Mapping[str, Tensor]]], repeats: int, dtype: str
) -> dict[str, list[float]]:
    """Seconds of every round of a training step, by model; the models come back for inference."""
    works = {}
    device = prompts["arm"][0].device
    for name, (model, prompt) in prompts.items():
        model.train().requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        ids = prompt["input_ids"]
        labels = ids.masked_fill(ids == model.config.image_token_index, IGNORE_INDEX)
        works[name] = partial(_step, model, {**prompt, "labels": labels}, dtype)
    timings = time_interleaved(
        works, device, repeats, after=lambda name: prompts[name][0].zero_grad()
    )
    for model, _ in prompts.values():
        model.eval().requires_grad_(False)
    return {name: [round(s, 6) for s in timing.seconds] for name, timing in timings.items()}


def _step(model: Any, inputs: Mapping[str, Tensor], dtype: str) -> None:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()


def baseline_config(config: Any) -> Any:
    """The configuration without ProxyV layers and without reduction, the same for every arm."""
    layer = config.vision_feature_layer
    return with_start(
        config,
        None,
        layout="natural",
        proxy_positions="consecutive",
        skip=None,
        reduction=None,
        proxy_kind="spatial",
        learned_proxies=None,
        vision_feature_layer=layer if isinstance(layer, int) else layer[-1],
    )


@torch.inference_mode()
def _tokens_left(model: Any, crops: Tensor, text: int) -> float:
    """Mean number of tokens of a crop that reach the end of the decoder; the others are zeros."""
    prompt = make_prompt(model, len(crops), text) | {"pixel_values": crops[None]}
    hidden = model.model(**prompt).last_hidden_state[0]
    is_image = prompt["input_ids"][0] == model.config.image_token_index
    left = int((hidden[is_image].abs().sum(dim=-1) > 0).sum())
    return left / len(crops) - 1  # the newline


def _flops(config: Any, row: RowTokens) -> dict[str, int]:
    """FLOPs of the decoder layers, in both conventions."""
    fused = config.text_config.model_type == "phi3"
    return {
        "paper": paper_flops(config, row, fused_qkv=fused),
        "as_run": decoder_flops(config, row, causal=True, folded=True),
    }
