"""Every shipped config reads, and its dry run says what it should."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from proxyv.model.chat_templates import TEMPLATES
from proxyv.train.build import output_folder
from proxyv.train.config_files import load_settings
from proxyv.train.dry_run import dry_run
from proxyv.train.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("cards", "reproduce")  # what several configs add, and tables of arms
FILES = sorted(path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name not in OTHERS)
MODELS = {  # start layers of the paper, learning rate of the ProxyV modules, rows at a time
    "vicuna-7b": (12, 16, 3e-4, 16),
    "vicuna-13b": (16, 20, 3e-4, 8),
    "llama3-8b": (16, 20, 3e-4, 8),
    "qwen2-7b": (16, 20, 8e-4, 16),
    "phi3-3b": (16, 20, 5e-4, 16),
    "internlm2.5-7b": (16, 20, 3e-4, 8),
}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def totals(text: str) -> dict[str, tuple[int, int]]:
    """Parameters and trainable parameters by part, from the table of a dry run."""
    found = {}
    for line in text.splitlines():
        words = line.replace(",", "").split()
        if len(words) >= 3 and words[1].isdigit() and words[2].isdigit():
            found[words[0]] = (int(words[1]), int(words[2]))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_reads_and_fits_its_name(path):
    settings = load_settings(path)
    stage, _, variant = path.stem.partition("-")
    suffix = f"-{variant}" if variant not in ("", "baseline") else ""
    assert settings.model.name == path.parent.name + suffix
    assert settings.stage.name == stage
    assert (settings.model.start_layer is None) == (variant == "baseline")
    assert settings.model.template in TEMPLATES
    one_card = variant.endswith("gb")
    ranks = 8 if settings.model.name.startswith(tuple(MODELS)) and not one_card else 1
    text = dry_run(settings, ranks)
    counts = totals(text)
    assert counts["vision_tower"][1] == 0 < counts["projector"][1]
    assert (counts["proxyv"][0] == 0) == (variant == "baseline")
    assert (counts["language_model"][1] > 0) == (stage == "finetune")
    assert f"accumulated = {settings.optim.global_batch}" in text
    assert re.search(r"step: [\d,]+ tokens, \d\.\d+e\+\d+ FLOPs", text)
    gib = float(re.search(r"about ([\d.]+) GiB a GPU", text)[1])
    assert gib < (float(variant.removesuffix("gb")) if one_card else 80)
    steps = re.search(r"^data: (?:steps unknown|.*?([\d,]+) steps)", text, re.M)
    assert steps and (steps[1] is None or int(steps[1].replace(",", "")) > 0)
    assert steps[1] or settings.data.expected_rows is None


@pytest.mark.parametrize("model", MODELS)
def test_recipes_are_the_authors(model):
    first, second, proxyv_lr, micro = MODELS[model]
    pretrain, finetune = (
        load_settings(ROOT / f"configs/{model}/{stage}.yaml") for stage in ("pretrain", "finetune")
    )
    optim = pretrain.optim
    assert (optim.lr, optim.proxyv_lr, optim.micro_batch) == (1e-3, proxyv_lr, micro)
    assert (finetune.optim.lr, finetune.optim.proxyv_lr) == (4e-5, None)
    assert (pretrain.data.max_length, finetune.data.max_length) == (2048, 4096)
    for settings in (pretrain, finetune):
        assert settings.optim.global_batch == 512 and settings.optim.warmup_ratio == 0.03
        assert settings.deepspeed.config == "configs/deepspeed/zero3.json"
        assert settings.model.start_layer == first
        folder = ROOT / f"configs/{model}"
        stage = settings.stage.name
        other = load_settings(folder / f"{stage}-L{second}.yaml")
        assert other.model.start_layer == second
        learned = load_settings(folder / f"{stage}-learned.yaml")
        assert (learned.model.proxy_kind, learned.model.start_layer) == ("learned", first)
    parsing = load_settings(ROOT / f"configs/{model}/finetune-parsing.yaml")
    assert parsing.model.init_from == str(output_folder(finetune))


def test_variants_name_a_base():
    for path in FILES:
        if path.stem != "pretrain":
            assert "\nbase: " in path.read_text(), path


def test_deepspeed_files_choose_their_stage():
    files = sorted((ROOT / "configs/deepspeed").glob("*.json"))
    assert len(files) == 5
    for path in files:
        content = json.loads(path.read_text())
        assert content["zero_optimization"]["stage"] == int(path.stem[4])
        assert ("offload" in path.stem) == ("offload_optimizer" in content["zero_optimization"])


def test_vicuna_pretrain_is_the_authors():
    settings = load_settings(ROOT / "configs/vicuna-7b/pretrain.yaml")
    text = dry_run(settings, ranks=8)
    parts = totals(text)
    assert parts["all"] == (7_356_590_080, 299_982_848)
    assert parts["proxyv"][0] == 20 * 14_684_160
    assert parts["language_model"][1] == parts["vision_tower"][1] == 0
    assert "8 ranks x 16 rows x 4 accumulated = 512" in text
    assert "2,434 steps" in text
    optim = settings.optim
    assert (optim.lr, optim.proxyv_lr, optim.warmup_ratio) == (1e-3, 3e-4, 0.03)


def test_vicuna_finetune_is_the_authors():
    settings = load_settings(ROOT / "configs/vicuna-7b/finetune.yaml")
    text = dry_run(settings, ranks=8)
    assert "8 ranks x 4 rows x 16 accumulated = 512" in text
    assert "1,522 steps" in text
    assert totals(text)["lm_head"] == (131_072_000, 131_072_000)
    data = settings.data
    assert (data.image_aspect_ratio, data.max_length) == ("anyres", 4096)
    assert (settings.optim.lr, settings.optim.proxyv_lr) == (4e-5, None)


def test_baseline_has_no_proxyv_parameters():
    settings = load_settings(ROOT / "configs/vicuna-7b/finetune-baseline.yaml")
    parts = totals(dry_run(settings, ranks=8))
    assert parts["proxyv"] == (0, 0)
    assert parts["all"][0] == 7_062_906_880


def test_defaults_are_the_papers_values():
    stated = load_settings(ROOT / "configs/vicuna-7b/pretrain.yaml")
    assert Settings().optim.global_batch == stated.optim.global_batch
    assert Settings().model.start_layer == stated.model.start_layer
