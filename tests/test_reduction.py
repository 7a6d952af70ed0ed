"""Making methods from options, and the plain controls."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_config
from transformers import CLIPVisionConfig, CLIPVisionModel

from proxyv.reduction import METHODS, TowerStates, build_reduction, check_combination
from proxyv.reduction.average_pool import AveragePool
from proxyv.reduction.base import STAGES
from proxyv.reduction.downsample import Downsample
from proxyv.reduction.random_drop import RandomDrop

NEEDED = {"fitprune": {"scheme": [0, 2, 1]}}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_options_survive_a_configuration_file(name) -> None:
    method = build_reduction({"method": name, **NEEDED.get(name, {})})
    assert method.stage in STAGES
    again = build_reduction(json.loads(json.dumps(method.options())))
    assert again == method and type(again) is METHODS[name]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'fastvv': did you mean 'fastv'"):
        build_reduction({"method": "fastvv"})
    with pytest.raises(ValueError, match=r"option of fastv 'layers': did you mean 'layer'"):
        build_reduction({"method": "fastv", "layers": 2})
    with pytest.raises(ValueError, match=r"no 'method'.*\['layer'\].*average_pool"):
        build_reduction({"layer": 2})
    with pytest.raises(ValueError, match=r"'fitprune' needs the option 'scheme'"):
        build_reduction({"method": "fitprune"})


def test_random_drop_keeps_the_same_places_in_raster_order(generator) -> None:
    states = TowerStates(torch.randn(3, 17, 4, generator=generator), True)
    method = RandomDrop(tokens=6, seed=2)
    out = method.reduce(states)
    places = out.origin[0].tolist()
    assert out.tokens.shape == (3, 6, 4) and out.valid.all()
    assert places == sorted(set(places)) and (out.origin == out.origin[:1]).all()
    assert torch.equal(out.tokens, states.features[:, [p + 1 for p in places]])
    other = RandomDrop(tokens=6, seed=3).reduce(states)
    assert other.origin[0].tolist() != places
    with pytest.raises(ValueError, match=r"random_drop.tokens.*1 to 16.*17"):
        RandomDrop(tokens=17).reduce(states)


def test_every_patch_is_as_likely_as_another() -> None:
    states = TowerStates(torch.zeros(1, 8, 1), False)
    counts = torch.zeros(8)
    for seed in range(400):
        counts[RandomDrop(tokens=2, seed=seed).reduce(states).origin[0]] += 1
    assert counts.min() > 60 and counts.max() < 140  # 100 +- 4.6 standard deviations


def test_average_pool_is_the_mean_of_blocks(generator) -> None:
    states = TowerStates(torch.randn(2, 37, 5, generator=generator), True)
    out = AveragePool(block=3).reduce(states)
    grid = states.patches.view(2, 6, 6, 5)
    for cell in range(4):
        y, x = 3 * (cell // 2), 3 * (cell % 2)
        torch.testing.assert_close(
            out.tokens[:, cell], grid[:, y : y + 3, x : x + 3].flatten(1, 2).mean(dim=1)
        )
    with pytest.raises(ValueError, match=r"average_pool.block=4.*36"):
        AveragePool(block=4).reduce(states)


def test_downsampled_crops_pass_the_tower(generator) -> None:
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            image_size=24, patch_size=4,
        )
    ).eval()  # fmt: skip
    pixels = torch.randn(2, 3, 24, 24, generator=generator)
    method = Downsample(side=4)
    small = method.shrink(pixels, 4)
    assert small.shape == (2, 3, 16, 16)
    states = tower(small, interpolate_pos_encoding=True).last_hidden_state
    assert states.shape[1] - 1 == method.tokens_per_crop(36) == 16
    flat = torch.full((1, 3, 24, 24), 0.7, dtype=torch.bfloat16)
    assert method.shrink(flat, 4).unique().tolist() == flat.unique().tolist()
    with pytest.raises(ValueError, match=r"downsample.side.*1 to 6.*7"):
        Downsample(side=7).shrink(pixels, 4)


def combine(options, start_layer=2, proxy_kind="spatial") -> None:
    check_combination(
        build_reduction(options), num_patches=576, num_layers=4, start_layer=start_layer,
        proxy_kind=proxy_kind,
    )  # fmt: skip


RAGGED = [
    {"method": "visionzip", "dominant": 360, "contextual": 40},
    {"method": "prumerge"},
    {"method": "random_drop"},
    {"method": "fastv"},
    {"method": "pyramiddrop", "layers": [1, 3], "ratios": [0.5, 0.25]},
    {"method": "fitprune", "scheme": [0, 100, 0, 0]},
]


@pytest.mark.parametrize("options", RAGGED, ids=lambda options: options["method"])
def test_spatial_proxies_need_a_grid(options) -> None:
    combine(options, proxy_kind="learned")
    combine(options, start_layer=None)
    with pytest.raises(ValueError, match=rf"'spatial'.*'{options['method']}'.*'learned'"):
        combine(options)


def test_spatial_proxies_of_smaller_grids() -> None:
    combine({"method": "tokenpacker", "scale": 2})
    combine({"method": "average_pool", "block": 3})
    combine({"method": "downsample", "side": 20})
    with pytest.raises(
        ValueError, match=r"=2 .* side of 1 tokens that .*tokenpacker.* leaves: use one of \[1\]"
    ):
        tiny_config(reduction={"method": "tokenpacker", "scale": 4})


def test_fitprune_ends_before_the_proxyv_layers() -> None:
    late = {"method": "fitprune", "scheme": [0, 0, 100, 0]}
    combine(late, start_layer=3, proxy_kind="learned")
    with pytest.raises(ValueError, match=r"'fitprune'.*layer 2.*start_layer=2.*fastv"):
        combine(late, proxy_kind="learned")
