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
from tests.test_study import QUESTIONS, answer_rightly, world  # noqa: F401 - a fixture

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


def test_one_table_of_models_and_methods(
    world: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = save_small_model(tmp_path / "base", start_layer=None)
    proxyv = save_small_model(tmp_path / "proxyv")
    output = tmp_path / "out"
    command = ["compare", f"base={base}", f"fastv={base}@{FASTV}", f"proxyv={proxyv}"]
    command += ["--data", str(world), "--tasks", "docvqa", "--output", str(output)]
    command += ["--crops", "2", "--text", "9", "--repeats", "2", "--device", "cpu"]
    assert main(command) == 0
    for name, right in (("base", 4), ("fastv", 2), ("proxyv", 4)):
        answer_rightly(output / name, right)
    capsys.readouterr()
    assert main([*command, "--json"]) == 0  # nothing is asked again
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["base", "fastv", "proxyv"]
    assert [row["model"] for row in rows] == ["baseline", "fastv", "ProxyV-L1"]
    assert [row["score %"] for row in rows] == pytest.approx([400 / 6, 200 / 6, 400 / 6])
    assert [row["gap"] for row in rows] == pytest.approx([0, -200 / 6, 0])
    for row in rows:
        assert row["from"] <= row["score %"] <= row["to"]
        assert row["prefill ms"] > 0 and row["peak MiB"] > 0
    assert rows[0]["saved %"] == 0 < rows[1]["saved %"] and rows[2]["saved %"] > 0
    assert (output / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "| fastv | fastv |" in (output / "compare.md").read_text()
    assert len(read_records(output / "fastv" / "docvqa.jsonl")) == QUESTIONS


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
