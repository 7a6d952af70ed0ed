"""Adapters act on every projection that ProxyV layers call, train, resume, and merge exactly."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_training import make_backbones, make_rows, overrides
from test_families import TEXT
from test_resume import At, train_with
from tiny_models import collate, sample, tiny_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from proxyv.train import run
from proxyv.train.adapters import add_adapters, has_adapters, plain_state, quantize
from proxyv.train.checkpoints import find_checkpoints
from proxyv.train.config_files import load_settings
from proxyv.train.settings import LoraSettings
from proxyv.train.stages import apply_stage, count_parts

ROOT = Path(__file__).resolve().parents[1]


def adapted(seed: int = 0, **options):
    """A model with adapters that change something."""
    model = tiny_model(start_layer=1, **options)
    add_adapters(model, LoraSettings(rank=2, alpha=3.0))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def batch_for(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return collate([sample(parts, model.config, generator) for parts in ([3, "1", 5], [2, "2", 4])])


@pytest.mark.parametrize("family", sorted(TEXT))
@pytest.mark.parametrize("kind", ["spatial", "learned"])
def test_adapters_act_on_every_row_and_merge_exactly(family, kind):
    model = adapted(proxy_kind=kind, text=TEXT[family])
    batch = batch_for(model)
    plain = tiny_model(start_layer=1, proxy_kind=kind, text=TEXT[family])
    with torch.no_grad():
        before = plain(**batch).logits
        with_adapters = model(**batch).logits
        plain.load_state_dict(plain_state(model, model.state_dict(), {}), strict=True)
        merged = plain(**batch).logits
    rows = batch["attention_mask"].bool()
    torch.testing.assert_close(with_adapters[rows], merged[rows], rtol=1e-4, atol=1e-4)
    assert (before - merged).abs().max() > 0.01


def test_each_projection_has_an_adapter_that_matters():
    """Also key and value of full rows, which ProxyV layers project apart from the others."""
    model = adapted()
    batch = batch_for(model)
    with torch.no_grad():
        whole = model(**batch).logits
        names = [n for n, _ in model.named_parameters() if "lora_B" in n]
        assert len(names) == 4 * 7
        for name in names:
            parameter = model.get_parameter(name)
            kept = parameter.clone()
            parameter.zero_()
            assert not torch.equal(model(**batch).logits, whole), name
            parameter.copy_(kept)


def test_gradients_reach_adapters_and_proxyv_alone():
    model = adapted().train()
    apply_stage(model, "finetune", adapters=True)
    counts = {part.part: part for part in count_parts(model)}
    assert counts["lm_head"].trainable == 0
    assert counts["projector"].trainable == counts["projector"].total
    batch = batch_for(model)
    model(
        **batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == 59, -100)
    ).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            assert has_adapters(name) or "language_model.layers" not in name or "guided" in name
        else:
            assert parameter.grad is None, name


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_backbones(folder)
    make_rows(folder, 8)
    return folder


@pytest.fixture(scope="module")
def first_stage(world) -> Path:
    return run.train(settings_for(world, "pretrain", **{"run.output_dir": world / "pretrain"}))


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings_for(world: Path, stage: str, **more: object):
    fixed = {"model.dtype": "float32", "deepspeed.config": "null", "optim.max_steps": 4, **more}
    return load_settings(ROOT / f"configs/tiny/{stage}.yaml", overrides(world, **fixed))


def test_a_lora_run_resumes_and_ends_as_a_plain_model(world, first_stage, tmp_path, monkeypatch):
    more = {"model.init_from": first_stage, "lora.rank": 4, "lora.alpha": 8, "optim.lr": 1e-2}
    whole, torn = (
        settings_for(
            world, "finetune", **more, **{"run.output_dir": tmp_path / n, "run.save_steps": 2}
        )
        for n in ("whole", "torn")
    )
    run.train(whole)
    with pytest.raises(ZeroDivisionError):
        train_with(monkeypatch, torn, At(3, lambda: 1 / 0))
    [(_, checkpoint)] = find_checkpoints(tmp_path / "torn")
    saved = load_file(checkpoint / "trained.safetensors")
    assert any(has_adapters(name) for name in saved)
    assert not [name for name in saved if name.endswith("base_layer.weight")]
    run.train(torn)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "torn"))
    before = load_file(first_stage / "model.safetensors")
    assert one.keys() == other.keys() == before.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = {name for name in one if not torch.equal(one[name], before[name])}
    assert any("q_proj" in name for name in moved) and any("guided_update" in n for n in moved)
    assert not [n for n in moved if "vision_tower" in n or "embed_tokens" in n or "lm_head" in n]

    from peft import PeftModel

    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    base.load_state_dict(
        {n: before[n] if "_proj" in n and "guided" not in n else v for n, v in one.items()}
    )
    adapters = PeftModel.from_pretrained(base, str(tmp_path / "whole" / "adapter"))
    batch = {"input_ids": torch.arange(5, 20)[None]}
    with torch.no_grad():
        torch.testing.assert_close(
            adapters(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4
        )
    assert json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())["r"] == 4


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def test_without_bitsandbytes_the_setting_says_so():
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ValueError, match=r"model\.quantize=nf4: .*pip install bitsandbytes"):
        quantize(tiny_model())


@needs_bitsandbytes
def test_qlora_trains_in_four_bits_and_merges_into_what_it_was_trained_with(
    world, first_stage, tmp_path
):
    more = {"model.quantize": "nf4", "run.output_dir": tmp_path / "one"}
    run.train(settings_for(world, "pretrain", **more))
    same = load_file(tmp_path / "one" / "model.safetensors")
    before = load_file(first_stage / "model.safetensors")
    assert all(torch.equal(same[n], before[n]) for n in before if "q_proj" in n)

    more = {"model.quantize": "nf4", "lora.rank": 4, "model.init_from": first_stage}
    run.train(settings_for(world, "finetune", **more, **{"run.output_dir": tmp_path / "two"}))
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "two")
    assert trained.lm_head.weight.dtype == torch.float32
    names = [n for n in before if "q_proj" in n and "language_model" in n]
    after = load_file(tmp_path / "two" / "model.safetensors")
    assert names and all(not torch.equal(after[n], before[n]) for n in names)


@needs_bitsandbytes
def test_four_bit_model_with_adapters_is_its_merged_model():
    model = tiny_model(start_layer=1, text={"hidden_size": 64, "intermediate_size": 64})
    plain = tiny_model(start_layer=1, text={"hidden_size": 64, "intermediate_size": 64})
    originals = quantize(model)
    assert len(originals) == 4 * 7
    add_adapters(model, LoraSettings(rank=2, alpha=3.0))
    batch = batch_for(model)
    rows = batch["attention_mask"].bool()
    with torch.no_grad():
        small, before = model(**batch).logits[rows], plain(**batch).logits[rows]
        plain.load_state_dict(plain_state(model, model.state_dict(), originals), strict=True)
        merged = plain(**batch).logits[rows]
    away = (small - merged).norm() / merged.norm()  # multiplied in bfloat16
    assert away < 0.03 and 3 * away < (small - before).norm() / before.norm()


@needs_bitsandbytes
def test_loading_in_four_bits(tmp_path):
    sizes = {"text": {"hidden_size": 64, "intermediate_size": 64}, "vision": {"hidden_size": 64}}
    plain = tiny_model(start_layer=1, spread=0.05, **sizes)
    plain.save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    small = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=four_bits)
    kinds = {name: type(module).__name__ for name, module in small.named_modules()}
    assert kinds["model.language_model.layers.1.self_attn.q_proj"] == "Linear4bit"
    assert small.get_memory_footprint() < plain.get_memory_footprint()
    batch = {name: values.to(small.device) for name, values in batch_for(plain).items()}
    rows = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted, logits = plain.to(small.device)(**batch).logits[rows], small(**batch).logits[rows]
    assert (logits.float() - wanted).norm() < 0.3 * wanted.norm()
    assert small.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
    with pytest.raises(ValueError, match=r"fuse\(\) cannot read the weight"):
        small.fuse()
