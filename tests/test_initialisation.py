"""New modules start as the authors' do, however a model comes into being."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from draws import check_draws, distance, normal, uniform
from tiny_models import tiny_config
from transformers import CLIPVisionModel, LlamaForCausalLM

from proxyv import ProxyVForConditionalGeneration

ROOT = Path(__file__).parents[1]
SIZES = {
    "text": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "vision": {"hidden_size": 48},
}
KINDS = {"spatial": {}, "learned": {"proxy_kind": "learned", "learned_proxies": 16}}


def config(start_layer: int | None = 1, kind: str = "spatial"):
    sizes = {name: dict(values) for name, values in SIZES.items()}
    return tiny_config(start_layer=start_layer, **sizes, **KINDS[kind])


def test_the_check_can_tell_distributions_apart() -> None:
    torch.manual_seed(0)
    drawn = torch.empty(3000).uniform_(-0.5, 0.5)
    assert distance(drawn, uniform(0.5)) < 2.5
    assert distance(drawn, uniform(0.45)) > 2.5
    assert distance(drawn, normal(0.5 / 3**0.5)) > 2.5


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_built_from_a_configuration(kind) -> None:
    torch.manual_seed(0)
    model = ProxyVForConditionalGeneration(config(kind=kind))
    assert check_draws(model) == 4 + 1 + 2 * 6 + (2 if kind == "learned" else 0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_built_on_the_meta_device_and_filled_later(kind) -> None:
    with torch.device("meta"):
        model = ProxyVForConditionalGeneration(config(kind=kind))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(0)
    model.initialize_weights()
    assert check_draws(model) > 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("baseline")
    torch.manual_seed(1)
    ProxyVForConditionalGeneration(config(start_layer=None)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_missing_from_a_checkpoint(kind, dtype, baseline) -> None:
    torch.manual_seed(0)
    model, report = ProxyVForConditionalGeneration.from_pretrained(
        baseline, start_layer=1, **KINDS[kind], dtype=dtype, output_loading_info=True
    )
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert check_draws(model, ("proxyv",)) == len(report["missing_keys"])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_joined_from_backbones(kind, tmp_path) -> None:
    own = config()
    CLIPVisionModel(own.vision_config).save_pretrained(tmp_path / "vision")
    LlamaForCausalLM(own.text_config).save_pretrained(tmp_path / "language")
    torch.manual_seed(0)
    model = ProxyVForConditionalGeneration.from_backbones(
        tmp_path / "vision",
        tmp_path / "language",
        config_overrides={"start_layer": 1, "side_reduction": 2, **KINDS[kind]},
    )
    assert check_draws(model) == 4 + 1 + 2 * 6 + (2 if kind == "learned" else 0)


@pytest.mark.slow
def test_under_zero3_on_two_processes(baseline) -> None:
    pytest.importorskip("deepspeed")
    words = ["--standalone", "--nproc-per-node", "2", "tests/draws.py", str(baseline)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checked 14 parameters under ZeRO-3") == 2
