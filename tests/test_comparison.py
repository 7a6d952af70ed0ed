"""The comparison of models and methods: costs against the formula, the table, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model

from proxyv.cli import run_command
from proxyv.eval.records import read_records
from proxyv.model.flops import RowTokens, run_flops
from proxyv.study.__main__ import main
from proxyv.study.comparison import parse_entry
from proxyv.study.cost import make_prompt, measure_cost
from tests.small_model import save_small_model
from tests.small_world import SIZES, answer_rightly, example, write_docvqa

FASTV = "method=fastv,layer=1,ratio=0.5"


@pytest.mark.parametrize(
    "options",
    [{"start_layer": None}, {"start_layer": 1}, {"start_layer": 1, "skip": "atn_ffn"}],
)
def test_counted_flops_are_those_of_the_formula(options) -> None:
    model = tiny_model(**options)
    cost = measure_cost(model, crops=2, text=7, repeats=2)
    parts = run_flops(model.config, RowTokens(crops=2, text=7), folded=True)
    assert cost.decoder_flops == parts["language_model"] + parts["proxyv"]
    assert cost.flops == sum(parts.values())
    assert model.config._attn_implementation == "sdpa"
    assert len(cost.prefill.seconds) == 2 and cost.prefill.median > 0
    assert cost.peak_bytes > 0


def test_a_method_that_drops_tokens_saves_flops() -> None:
    plain = tiny_model(start_layer=None)
    reduced = tiny_model(start_layer=None, reduction={"method": "fastv", "layer": 1, "ratio": 0.5})
    first, second = (measure_cost(model, 2, 7, 1) for model in (plain, reduced))
    assert second.decoder_flops < first.decoder_flops
    ids = make_prompt(reduced, 2, 7)["input_ids"][0]
    assert len(ids) == 7 + 2 * 17 and int((ids == 59).sum()) == 34


def test_one_table_of_models_and_methods_by_the_example_in_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_small_model(Path("runs/tiny-baseline/finetune"), start_layer=None)
    save_small_model(Path("runs/tiny/finetune"))
    write_docvqa(Path("data/generated"), SIZES)
    output = Path("runs/study/compare")
    command = [*example("compare"), "--device", "cpu"]
    assert main(command) == 0
    for name, right in (("base", 4), ("fastv", 2), ("proxyv", 4)):
        answer_rightly(output / name, right)
    capsys.readouterr()
    assert main([*command, "--json"]) == 0  # nothing is asked again
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert [row["name"] for row in rows] == ["base", "fastv", "proxyv"]
    assert [row["model"] for row in rows] == ["baseline", "fastv", "ProxyV-L1"]
    assert [row["score %"] for row in rows] == pytest.approx([400 / 6, 200 / 6, 400 / 6])
    assert [row["gap"] for row in rows] == pytest.approx([0, -200 / 6, 0])
    for row in rows:
        assert row["from"] <= row["score %"] <= row["to"]
        assert row["prefill ms"] > 0 and row["peak MiB"] > 0
    assert rows[0]["saved %"] == 0 < rows[1]["saved %"] and rows[2]["saved %"] > 0
    assert found["settings"]["device"] == "cpu"
    assert (output / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "| fastv | fastv |" in (output / "compare.md").read_text()
    assert len(read_records(output / "fastv" / "docvqa.jsonl")) == len(SIZES)


def test_models_are_named() -> None:
    entry = parse_entry(f"fast=runs/base@{FASTV}")
    assert (entry.name, entry.model) == ("fast", "runs/base")
    assert entry.fields == {"reduction": {"method": "fastv", "layer": 1, "ratio": 0.5}}
    assert parse_entry("a=b").fields == {}
    assert parse_entry("a=b@none").fields == {"reduction": None}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["runs/base"], "write NAME=MODEL"),
        (["a=nowhere"], "nowhere: no such folder"),
        (["a=x", "a=y"], "give each model a name of its own"),
        (["a=x@fastv"], "expected key=value"),
        (["a=x", "--repeats", "0"], "--repeats 0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(models, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["compare", *models, "--tasks", "docvqa"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("reduced", "start_layer", "message"),
    [
        ("method=fastv,layer=9", None, "fastv.layer must be an integer from 1 to 2, got 9"),
        ("method=visionzip,dominant=5,contextual=2", 1, "proxy_kind='learned'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    reduced, start_layer, message, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_small_model(tmp_path / "model", start_layer=start_layer)
    write_docvqa(tmp_path, SIZES)
    command = ["compare", f"base={model}", f"other={model}@{reduced}", "--tasks", "docvqa"]
    command += ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert run_command(main, command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_are_no_crops_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_small_model(tmp_path, start_layer=None, packing="llava_next")
    command = ["compare", f"base={model}", "--tasks", "docvqa", "--data", str(tmp_path)]
    assert run_command(main, command) == 2
    assert "base: the image rows" in capsys.readouterr().err
