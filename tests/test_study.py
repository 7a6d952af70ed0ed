"""The study's commands on small models: curve, tables, resuming, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from proxyv.cli import run_command
from proxyv.eval.answerer import Answerer
from proxyv.eval.records import read_records, rewrite_records
from proxyv.profiling.__main__ import main as profile
from proxyv.study.__main__ import main
from proxyv.study.redundancy import layer_counts
from tests.small_model import save_small_model
from tests.small_world import SIZES, answer_rightly, evaluate_small, example, write_docvqa

MODELS: dict[str, dict[str, Any]] = {
    "tiny-baseline": {"start_layer": None},
    "tiny-atn": {"skip": "atn"},
    "tiny-atn_ffn": {"skip": "atn_ffn"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data where the README's commands put them."""
    folder = tmp_path_factory.mktemp("place")
    write_docvqa(folder / "data/generated", SIZES)
    for name, options in MODELS.items():
        save_small_model(folder / "runs" / name / "finetune", **options)
    return folder


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def study(place: Path) -> Path:
    """The redundancy study of the baseline, by its example in ``--help``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(redundancy()) == 0
    return place / "runs/study/tiny-baseline-finetune-vision"


def redundancy(*more: str) -> list[str]:
    return [*example("redundancy"), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def evaluated(place: Path) -> Path:
    """Finished evaluations of the baseline and of models that skip."""
    for name in ("baseline", "atn", "atn_ffn"):
        model, output = place / f"runs/tiny-{name}/finetune", place / "runs/eval" / name
        assert evaluate_small(model, place / "data/generated", output) == 0
    return place / "runs/eval"


def test_ratios_become_layers() -> None:
    assert layer_counts([0, 0.1, 0.5, 1], 32) == [0, 3, 16, 32]
    assert layer_counts([0.01, 0.02], 32) == [0, 1]
    assert layer_counts([1], 3) == [0, 3]


def test_the_curve_is_a_table_a_picture_and_numbers(study: Path) -> None:
    found = json.loads((study / "redundancy.json").read_text())
    assert [row["layers"] for row in found["rows"]] == [0, 2, 3]
    assert [round(row["ratio"], 3) for row in found["rows"]] == [0, 0.667, 1]
    assert [row["masked"] for row in found["rows"]] == [0, 2, 3]
    assert found["settings"]["hide"] == "vision" and found["settings"]["device"] == "cpu"
    assert (study / "redundancy.png").read_bytes()[:4] == b"\x89PNG"
    table = (study / "redundancy.md").read_text()
    assert "| ratio | layers |" in table and "seed 0" in table
    for number in ("masked-00", "masked-02", "masked-03"):
        assert len(read_records(study / number / "docvqa.jsonl")) == len(SIZES)
    settings = json.loads((study / "masked-02" / "settings.json").read_text())
    assert settings["masked"] == [1, 2] and settings["hidden"] == "vision"


def test_without_masking_the_answers_are_those_of_an_evaluation(
    study: Path, evaluated: Path
) -> None:
    masked = read_records(study / "masked-00" / "docvqa.jsonl")
    assert masked == read_records(evaluated / "baseline" / "docvqa.jsonl")


def test_a_ratio_that_was_scored_is_not_asked_again(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, list[int]]] = []
    original = Answerer.generate

    def counted(self: Answerer, prepared: Any, most: int) -> list[str]:
        layers = self.model.model.language_model.layers
        hooks = [len(layer._forward_pre_hooks) for layer in layers]
        asked.append((len(prepared), hooks))
        return original(self, prepared, most)

    monkeypatch.setattr(Answerer, "generate", counted)
    path = study / "masked-02" / "docvqa.jsonl"
    before = read_records(path)
    rewrite_records(path, before[:4])
    assert main(redundancy()) == 0
    assert asked == [(len(SIZES), [0, 1, 1])]  # the batch of the two, at one ratio
    assert read_records(path) == before


def tables(folder: Path) -> list[list[dict[str, Any]]]:
    return [json.loads((folder / f"table{n}.json").read_text())["rows"] for n in (1, 2)]


def test_tables_say_what_is_lost_and_saved(
    study: Path,
    evaluated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, right in (("baseline", 6), ("atn", 3), ("atn_ffn", 2)):
        shutil.copytree(evaluated / name, tmp_path / "runs/eval" / name)
        answer_rightly(tmp_path / "runs/eval" / name, right)
    command = example("table")
    assert command[1:] == [f"runs/eval/{name}" for name in ("baseline", "atn", "atn_ffn")]
    more = [str(study / "masked-03"), "--crops", "2", "--text", "9"]
    assert main([*command, *more]) == 0
    first, second = tables(tmp_path / "runs/study")
    assert [row["run"] for row in first] == ["baseline", "ATN-L1", "baseline, masked from L0"]
    assert [row["how"] for row in first] == ["trained", "trained", "training-free, vision hidden"]
    assert [row["run"] for row in second] == ["baseline", "ATN+FFN-L1"]
    assert first[1]["of base %"] == pytest.approx(50)
    assert first[1]["gap"] == pytest.approx(-50)
    assert second[1]["score %"] == pytest.approx(100 / 3)
    assert first[0]["FLOPs saved %"] == 0 and "time saved %" not in first[0]
    assert 0 < first[1]["FLOPs saved %"] < first[2]["FLOPs saved %"]
    assert second[1]["FLOPs saved %"] > first[1]["FLOPs saved %"]
    low, value, high = (first[1][key] for key in ("from", "score %", "to"))
    assert 0 <= low < value < high <= 100
    assert "| ATN-L1 | trained |" in (tmp_path / "runs/study/table1.md").read_text()
    assert run_command(main, ["table", command[2], command[1]]) == 2
    assert "give the baseline first" in capsys.readouterr().err
    path = tmp_path / command[2] / "docvqa.jsonl"
    records = read_records(path)
    rewrite_records(path, [{**records[0], "references": ["another"]}, *records[1:]])
    assert run_command(main, command) == 2
    assert "were not asked the same questions" in capsys.readouterr().err


def test_tables_take_the_time_from_a_latency_report(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "layers=3,width=32,heads=4,ffn=64,side=4"
    command = ["latency", "--shape", shape, "--start-layers", "1", "--skip", "atn,atn_ffn"]
    command += ["--crops", "1", "--repeats", "1", "--operations", "prefill", "--device", "cpu"]
    assert profile([*command, "--output", str(tmp_path)]) == 0
    given = [*example("table"), "--output", str(tmp_path)]
    assert main([*given, "--latency", str(tmp_path / "latency.json")]) == 0
    measured = {
        row["arm"]: row["time saved %"]
        for row in json.loads((tmp_path / "latency.json").read_text())["rows"]
    }
    for rows, arm in zip(tables(tmp_path), ("ATN-L1", "ATN+FFN-L1"), strict=True):
        assert [row["time saved %"] for row in rows] == [0, measured[arm]]
    assert run_command(main, [*given, "--latency", str(tmp_path / "table1.json")]) == 2
    assert "holds no prefills" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--ratios", "0,2"], "--ratios '0,2': write shares from 0 to 1"),
        (["--ratios", "half"], "--ratios 'half'"),
        (["--tasks", "docvq"], "did you mean 'docvqa'"),
        (["--tasks", "docvqa,mme"], "mme: mme_perception_score is no share"),
        (["--tasks", "docvqa,mmbench"], "mmbench: circular_accuracy is no share"),
        (["--tasks", "docvqa_test"], "docvqa_test: its answers are known to a test server only"),
        (["--hide", "vision", "--model", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(change, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, redundancy(*change)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_another_setting_does_not_mix(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, redundancy("--hide", "all", "--output", str(study))) == 2
    assert "holds a run with hidden 'vision'" in capsys.readouterr().err
