"""The study's commands on small models: curve, tables, resuming, mistakes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from proxyv.cli import run_command
from proxyv.eval.__main__ import main as evaluate
from proxyv.eval.answerer import Answerer
from proxyv.eval.records import read_records, rewrite_records
from proxyv.study.__main__ import main
from proxyv.study.redundancy import layer_counts
from tests.small_model import save_small_model

QUESTIONS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for index in range(QUESTIONS):
        stream = io.BytesIO()
        generator = np.random.default_rng(index)
        pixels = generator.integers(0, 255, (40, 30 + 20 * (index % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append(
            {
                "questionId": str(index),
                "question": "What?",
                "image": {"bytes": stream.getvalue(), "path": None},
                "docId": index,
                "answers": [f"answer {index}"],
            }
        )
    (folder / "docvqa").mkdir()
    table = Dataset.from_list(rows).cast_column("image", ImageFeature())
    table.to_parquet(str(folder / "docvqa/validation.parquet"))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "baseline": save_small_model(folder / "baseline", start_layer=None),
        "atn": save_small_model(folder / "atn", skip="atn"),
        "atn_ffn": save_small_model(folder / "atn_ffn", skip="atn_ffn"),
    }


@pytest.fixture(scope="module")
def study(models, world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A redundancy study of the baseline at three ratios."""
    output = tmp_path_factory.mktemp("study")
    assert main(redundancy(models["baseline"], world, output)) == 0
    return output


def redundancy(model: Path, world: Path, output: Path) -> list[str]:
    given = {"model": model, "data": world, "output": output, "device": "cpu", "tasks": "docvqa"}
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return ["redundancy", *options, "--ratios", "0.33,0.3,1"]


def answer_rightly(folder: Path, right: int) -> None:
    """Give the first questions of a run right answers, the others wrong ones."""
    path = folder / "docvqa.jsonl"
    records = read_records(path)
    for record in records:
        good = record["index"] < right
        record["answer"] = record["references"][0] if good else "no"
    rewrite_records(path, records)
    assert evaluate(["rescore", str(folder)]) == 0


def test_ratios_become_layers() -> None:
    assert layer_counts([0, 0.1, 0.5, 1], 32) == [0, 3, 16, 32]
    assert layer_counts([0.01, 0.02], 32) == [0, 1]
    assert layer_counts([1], 3) == [0, 3]


def test_the_curve_is_a_table_a_picture_and_numbers(study: Path) -> None:
    found = json.loads((study / "redundancy.json").read_text())
    assert [row["layers"] for row in found["rows"]] == [0, 1, 3]
    assert [round(row["ratio"], 3) for row in found["rows"]] == [0, 0.333, 1]
    assert [row["masked"] for row in found["rows"]] == [0, 1, 3]
    assert found["settings"]["hide"] == "vision"
    assert (study / "redundancy.png").read_bytes()[:4] == b"\x89PNG"
    assert "| ratio | layers |" in (study / "redundancy.md").read_text()
    answers = {
        number: [record["answer"] for record in read_records(study / number / "docvqa.jsonl")]
        for number in ("masked-00", "masked-01", "masked-03")
    }
    assert all(len(own) == QUESTIONS for own in answers.values())
    settings = json.loads((study / "masked-03" / "settings.json").read_text())
    assert settings["masked"] == [0, 1, 2] and settings["hidden"] == "vision"


def test_without_masking_the_answers_are_those_of_an_evaluation(
    study: Path, models, world: Path, tmp_path: Path
) -> None:
    given = ["--model", str(models["baseline"]), "--data", str(world), "--output", str(tmp_path)]
    assert evaluate([*given, "--tasks", "docvqa", "--device", "cpu"]) == 0
    assert read_records(tmp_path / "docvqa.jsonl") == read_records(
        study / "masked-00" / "docvqa.jsonl"
    )


def test_a_ratio_that_was_scored_is_not_asked_again(
    study: Path, models, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, list[int]]] = []
    original = Answerer.generate

    def counted(self: Answerer, prepared: Any, most: int) -> list[str]:
        layers = self.model.model.language_model.layers
        hooks = [len(layer._forward_pre_hooks) for layer in layers]
        asked.append((len(prepared["input_ids"]), hooks))
        return original(self, prepared, most)

    monkeypatch.setattr(Answerer, "generate", counted)
    path = study / "masked-01" / "docvqa.jsonl"
    before = read_records(path)
    rewrite_records(path, before[:4])
    assert main(redundancy(models["baseline"], world, study)) == 0
    assert asked == [(QUESTIONS, [0, 0, 1])]  # the batch of the two, at one ratio
    assert read_records(path) == before


def test_tables_say_what_is_lost_and_saved(
    study: Path, models, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for (name, model), right in zip(models.items(), (6, 3, 2), strict=True):
        folder = tmp_path / name
        given = ["--model", str(model), "--data", str(world), "--output", str(folder)]
        assert evaluate([*given, "--tasks", "docvqa", "--device", "cpu"]) == 0
        answer_rightly(folder, right)
        folders.append(str(folder))
    capsys.readouterr()
    masked = str(study / "masked-03")
    sizes = ["--crops", "2", "--text", "9"]
    assert main(["table", *folders, masked, "--output", str(tmp_path), *sizes]) == 0
    first, second = (
        json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("table1", "table2")
    )
    assert [row["run"] for row in first] == ["baseline", "ATN-L1", "baseline, masked from L0"]
    assert [row["how"] for row in first] == ["trained", "trained", "training-free, vision hidden"]
    assert [row["run"] for row in second] == ["baseline", "ATN+FFN-L1"]
    assert first[1]["of base %"] == pytest.approx(50)
    assert first[1]["gap"] == pytest.approx(-50)
    assert second[1]["score %"] == pytest.approx(100 / 3)
    assert first[0]["FLOPs saved %"] == 0
    assert 0 < first[1]["FLOPs saved %"] < first[2]["FLOPs saved %"]
    assert second[1]["FLOPs saved %"] > first[1]["FLOPs saved %"]
    low, value, high = (first[1][key] for key in ("from", "score %", "to"))
    assert 0 <= low < value < high <= 100
    assert "| ATN-L1 | trained |" in (tmp_path / "table1.md").read_text()
    assert run_command(main, ["table", folders[1], folders[0]]) == 2
    assert "give the baseline first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--ratios", "0,2"], "--ratios '0,2': write shares from 0 to 1"),
        (["--ratios", "half"], "--ratios 'half'"),
        (["--tasks", "docvq"], "did you mean 'docvqa'"),
        (["--hide", "vision", "--model", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(
    models, world: Path, tmp_path: Path, change, message, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*redundancy(models["baseline"], world, tmp_path), *change]
    assert run_command(main, command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_another_setting_does_not_mix(
    study: Path, models, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*redundancy(models["baseline"], world, study), "--hide", "all"]
    assert run_command(main, command) == 2
    assert "holds a run with hidden 'vision'" in capsys.readouterr().err
