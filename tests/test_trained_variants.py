"""The study's variants trained in both stages, then loaded, scored, measured, put into tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from proxyv.eval.records import read_records
from proxyv.model.flops import RowTokens, run_flops
from proxyv.model.parts import parameter_part
from proxyv.study.__main__ import main as study
from proxyv.synthetic.world import write_world
from proxyv.train import run
from proxyv.train.config_files import load_settings

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"pretrain": "sharegpt4v/captions.json", "finetune": "llava_next/conversations.json"}
DEPTH, START, STEPS = 8, 3, 6
ARMS = {
    "base": ["model.start_layer=null"],
    "atn": ["model.skip=atn"],
    "atn_ffn": ["model.skip=atn_ffn"],
    "tokenpacker": [
        "model.start_layer=null",
        "model.projector=null",
        "model.reduction.method=tokenpacker",
        "model.reduction.scale=2",
        "model.reduction.heads=2",
    ],
    "pyramiddrop": [
        "model.proxy_kind=learned",
        "model.reduction.method=pyramiddrop",
        "model.reduction.layers=[2,5]",
        "model.reduction.ratios=[0.5,0.25]",
    ],
}
NAMES = ["baseline", "ATN-L3", "ATN+FFN-L3", "tokenpacker", "ProxyV-L3+pyramiddrop"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=1, train_documents=4, train_charts=2, test_documents=2, test_charts=2,
                questions_per_page=3, workers=1)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Both stages of each arm from the shipped preset, a few steps each."""
    place = tmp_path_factory.mktemp("runs")
    found: dict[str, dict[str, Path]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for arm, overrides in ARMS.items():
            found[arm] = {stage: place / arm / stage for stage in STAGES}
            for stage, rows in STAGES.items():
                values = {
                    "data.annotations": world / rows,
                    "data.images": world,
                    "data.workers": 0,
                    "optim.global_batch": 4,
                    "optim.micro_batch": 2,
                    "optim.max_steps": STEPS,
                    "deepspeed.config": "null",
                    "run.log_steps": 1,
                    "run.output_dir": found[arm][stage],
                }
                if stage == "finetune":
                    values["model.init_from"] = found[arm]["pretrain"]
                given = [*overrides, *(f"{key}={value}" for key, value in values.items())]
                run.train(load_settings(ROOT / f"configs/tiny/{stage}.yaml", given))
    return found


@pytest.fixture(scope="module")
def compared(world: Path, trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores and costs of all, side by side."""
    output = tmp_path_factory.mktemp("compared")
    words = [f"{arm}={folders['finetune']}" for arm, folders in trained.items()]
    words += ["--data", str(world), "--tasks", "docvqa,chartqa", "--limit", "3"]
    words += ["--crops", "2", "--text", "20", "--repeats", "1", "--device", "cpu"]
    assert study(["compare", *words, "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("arm", ARMS)
def test_the_stages_train_what_they_name(arm, trained) -> None:
    folders = trained[arm]
    for folder in folders.values():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
        assert len(losses) == STEPS and all(loss > 0 for loss in losses)
    first, second = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        part, moved = parameter_part(name), not torch.equal(tensor, second[name])
        if part == "proxyv":
            last = f".layers.{DEPTH - 1}." in name
            assert moved != last, f"{name}: nothing reads what the last layer writes"
        elif part == "projector" or ("mlp" in name and part == "language_model"):
            assert moved, name
        elif part == "vision_tower":
            assert not moved, name
    own = sum("light_mlp" in name for name in first)
    assert own == (2 * (DEPTH - START) if arm == "atn_ffn" else 0)


@pytest.mark.parametrize("arm", ["atn", "atn_ffn"])
def test_a_model_that_skips_loads_with_its_layers(arm, trained) -> None:
    model = AutoModelForImageTextToText.from_pretrained(trained[arm]["finetune"])
    assert (model.config.skip, model.config.start_layer) == (arm, START)
    names = [type(layer).__name__ for layer in model.model.language_model.layers]
    assert len(set(names[:START])) == 1 and len(set(names[START:])) == 1
    assert names[START].startswith("Skip") and not names[0].startswith("Skip")


def test_scores_and_costs(compared: Path, trained) -> None:
    found = json.loads((compared / "compare.json").read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in found] == NAMES
    saved = [row["saved %"] for row in found]
    assert 0 == saved[0] < saved[1] < saved[2] and min(saved[3:]) > 0
    for row, folders in zip(found, trained.values(), strict=True):
        config = AutoModelForImageTextToText.from_pretrained(folders["finetune"]).config
        parts = run_flops(config, RowTokens(crops=2, text=20), folded=True)
        counted, formula = row["GFLOPs"] * 1e9, parts["language_model"] + parts["proxyv"]
        # Crops that lose unevenly are padded, which the formula does not count.
        padded = 1.1 if row["name"] == "pyramiddrop" else 1 + 1e-9
        assert formula * (1 - 1e-9) <= counted <= formula * padded
        assert row["prefill ms"] > 0 and row["peak MiB"] > 0
        for task in ("docvqa", "chartqa"):
            answers = [r["answer"] for r in read_records(compared / row["name"] / f"{task}.jsonl")]
            assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
        mean = (row["docvqa %"] + row["chartqa %"]) / 2
        assert row["score %"] == pytest.approx(mean)


def test_tables(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text(encoding="utf-8"))["rows"]
    runs = [str(compared / arm) for arm in ("base", "atn", "atn_ffn")]
    assert study(["table", *runs, "--output", str(compared)]) == 0
    for number in (1, 2):
        table = json.loads((compared / f"table{number}.json").read_text(encoding="utf-8"))["rows"]
        assert [row["run"] for row in table] == [NAMES[0], NAMES[number]]
        assert [row["score %"] for row in table] == [found[0]["score %"], found[number]["score %"]]
        assert table[1]["FLOPs saved %"] > 0
