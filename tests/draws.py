"""Does a model's new part follow the distributions of the authors' code? Also under ZeRO-3.

    torchrun --standalone --nproc-per-node 2 tests/draws.py FOLDER

loads the baseline in FOLDER with a start layer, so that the new modules are drawn while their
weights are spread over two processes, and compares every one of them.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from proxyv.model.parts import parameter_part


def distance(values: Tensor, cumulative) -> float:
    """Largest gap between the empirical and the expected distribution, times sqrt(n)."""
    values = values.detach().flatten().double().sort().values
    n = len(values)
    expected, steps = cumulative(values), torch.arange(n + 1, dtype=torch.float64) / n
    gap = torch.maximum((steps[1:] - expected).abs(), (steps[:-1] - expected).abs()).max()
    return float(gap) * math.sqrt(n)


def uniform(bound: float):
    return lambda x: ((x + bound) / (2 * bound)).clamp(0, 1)


def normal(std: float):
    return lambda x: 0.5 * (1 + torch.erf(x / (std * 2**0.5)))


def expected_distribution(name: str, config):
    """Cumulative distribution that a new parameter was drawn from; None for ones."""
    width, hidden = config.text_config.hidden_size, config.guided_width
    tower = config.vision_config.hidden_size
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if name.endswith("image_newline"):
        return normal(width**-0.5)
    if kind == "queries":
        return normal((4 * hidden) ** -0.5)
    if layer == "norm":
        return None
    fan_in = {
        "input_proj": width,
        "context_proj": width,
        "merge_input": 2 * hidden,
        "merge_context": 2 * hidden,
        "output_proj": hidden,
        "key_proj": width,
        "linear_1": tower,
        "linear_2": width,
    }
    return uniform(fan_in[layer] ** -0.5)


def check_draws(model, parts=("projector", "newline", "proxyv"), gather=None) -> int:
    """Compare every parameter of these parts; returns how many there were.

    The bound is that of Kolmogorov's distribution at a chance of one in 10^5.
    """
    found = 0
    for name, parameter in model.named_parameters():
        if parameter_part(name) not in parts:
            continue
        values = parameter if gather is None else gather(parameter)
        expected = expected_distribution(name, model.config)
        if expected is None:
            assert bool((values == 1).all()), name
        else:
            assert distance(values, expected) < 2.5, name
        found += 1
    return found


def main(folder: Path) -> None:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from proxyv import ProxyVForConditionalGeneration

    deepspeed.init_distributed("gloo")
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    kept = HfDeepSpeedConfig(settings)  # while it lives, models are built in pieces
    torch.manual_seed(0)
    model = ProxyVForConditionalGeneration.from_pretrained(
        folder, start_layer=1, proxy_kind="learned", learned_proxies=16
    )
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters()), kept

    def gather(parameter: Tensor) -> Tensor:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    found = check_draws(model, parts=("proxyv",), gather=gather)
    totals = [float(gather(p).double().sum()) for p in model.parameters()]
    both = [None, None]
    torch.distributed.all_gather_object(both, totals)
    assert both[0] == both[1], "the processes hold different weights"
    print(f"checked {found} parameters under ZeRO-3")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
