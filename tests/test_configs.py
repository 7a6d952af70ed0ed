"""Every shipped config reads, and its dry run says what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxyv.train.config_files import load_settings
from proxyv.train.dry_run import dry_run
from proxyv.train.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("configs/*/*.yaml"))


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
    assert settings.model.name == path.parent.name
    assert settings.stage.name == path.stem.split("-")[0]
    assert (settings.model.start_layer is None) == ("baseline" in path.stem)
    assert Path(settings.deepspeed.config or "").is_file()


def test_variants_name_a_base():
    for path in FILES:
        if path.stem != "pretrain":
            assert path.read_text().splitlines()[-1]
            assert "\nbase: " in path.read_text(), path


def test_deepspeed_files_choose_their_stage():
    for stage in (2, 3):
        content = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
        assert content["zero_optimization"]["stage"] == stage


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
