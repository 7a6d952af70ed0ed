"""What the trainer does with bad steps, bad rows, like rows and trackers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_training import break_token, make_backbones, make_rows, overrides
from transformers import TrainerCallback

from proxyv import ProxyVConfig
from proxyv.data.templates import Renderer
from proxyv.train import run
from proxyv.train.config_files import load_settings
from proxyv.train.cost import RowShape, row_flops
from proxyv.train.group_norms import GroupNorms
from proxyv.train.stage0.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_backbones(folder)
    make_rows(folder, 8, text_only=4)
    break_token(folder, "~")
    return folder


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def train(world: Path, folder: Path, **more: object) -> Path:
    values = {
        "run.output_dir": folder,
        "optim.max_steps": 3,  # one pass
        "model.dtype": "float32",
        "deepspeed.config": "null",
        **more,
    }
    return run.train(load_settings(ROOT / "configs/tiny/pretrain.yaml", overrides(world, **values)))


def metrics(folder: Path) -> list[dict]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


def test_a_step_that_is_not_finite_changes_nothing(world, tmp_path, capsys):
    broken = {"model.language": world / "broken-language"}
    folder = train(world, tmp_path / "run", **broken)
    entries = metrics(folder)
    bad = [
        e["step"]
        for e, before in zip(entries, [None, *entries], strict=False)
        if e["skipped_steps"] > (before["skipped_steps"] if before else 0)
    ]
    assert len(bad) == 1 and entries[-1]["skipped_steps"] == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(said) == 1
    assert said[0].startswith(f"warning: step {bad[0]}: the loss of these rows is not finite: ")
    assert "id 'text-0'" in said[0] and said[0].count("rows.json") <= 2  # its micro-batch
    weights = load_file(folder / "model.safetensors")
    assert all(value.isfinite().all() for name, value in weights.items() if "embed" not in name)


class Copies(TrainerCallback):
    """What trains, after each step."""

    def __init__(self) -> None:
        self.after: dict = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }


def test_a_step_that_is_left_out_moves_no_weight(world, tmp_path, monkeypatch):
    copies, make = Copies(), run.Progress
    monkeypatch.setattr(run, "Progress", lambda: [make(), copies][1])
    broken = {"model.language": world / "broken-language", "optim.max_steps": 6}
    broken["run.max_skipped_steps"] = 2  # in a row, which those of two passes are not
    entries = metrics(train(world, tmp_path / "run", **broken))
    counts = [0, *(entry["skipped_steps"] for entry in entries)]
    left_out = [step for step in range(2, 7) if counts[step] > counts[step - 1]]
    assert left_out  # momentum exists only from the second step on
    for step in range(2, 7):
        before, after = copies.after[step - 1], copies.after[step]
        same = all(torch.equal(before[name], after[name]) for name in after)
        assert same == (step in left_out), step


def test_too_many_of_them_stop_the_run(world, tmp_path):
    broken = {"model.language": world / "broken-language", "run.max_skipped_steps": 1}
    with pytest.raises(ValueError, match=r"text-0.*1 steps in a row.*run\.max_skipped_steps"):
        train(world, tmp_path / "run", **broken)
    assert not (tmp_path / "run" / run.FINISHED).exists()


def test_a_row_that_fails_is_left_out_counted_and_listed(world, tmp_path):
    rows = json.loads((world / "rows.json").read_text())
    rows[3]["image"] = "images/gone.png"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    folder = train(world, tmp_path / "run", **{"data.annotations": path, "data.on_failure": "skip"})
    [line] = (folder / "failures.txt").read_text().splitlines()
    assert "row 3 (id 'row-3')" in line and "gone.png" in line
    assert metrics(folder)[-1]["failed_rows"] == 1


def test_like_rows_go_together(world, tmp_path):
    folder = train(world, tmp_path / "run", **{"data.group_by_length": True})
    assert len(metrics(folder)) == 3
    [table] = (tmp_path / ".rows").glob("*.npy")
    written = table.stat().st_mtime_ns
    again = train(world, tmp_path / "again", **{"data.group_by_length": True})
    assert table.stat().st_mtime_ns == written
    assert [e["loss"] for e in metrics(folder)] == [e["loss"] for e in metrics(again)]


def test_the_log_counts_tokens_and_flops_of_the_rows(world, tmp_path):
    """One step over all of them; what pads them counts for nothing."""
    batches = {"optim.max_steps": 1, "optim.global_batch": 12, "optim.micro_batch": 4}
    folder = train(world, tmp_path / "run", **batches)
    renderer, config = Renderer(build_tokenizer(), "tiny"), ProxyVConfig.from_pretrained(folder)
    tokens = supervised = flops = 0.0
    for row in json.loads((world / "rows.json").read_text()):
        crops = int("image" in row)
        rendered = renderer.render(row["conversations"], [65] * crops)  # 8 x 8 and a newline
        length, labels = len(rendered.input_ids), rendered.num_supervised
        shape = RowShape(crops, length - 65 * crops, labels)
        flops += sum(row_flops(config, shape, {"projector", "proxyv"}).values())
        tokens, supervised = tokens + length, supervised + labels
    [entry] = metrics(folder)
    assert entry["supervised_share"] == pytest.approx(supervised / tokens, abs=1e-4)
    of_a_token = 1e12 * entry["tflops_per_second"] / entry["tokens_per_second"]
    assert of_a_token == pytest.approx(flops / tokens, rel=0.01)


def test_no_tracker_writes_nothing(world, tmp_path):
    folder = train(world, tmp_path / "run", **{"run.tracker": "none"})
    assert not (folder / "metrics.jsonl").exists()
    assert json.loads((folder / run.FINISHED).read_text())["steps"] == 3


def test_wandb_keeps_its_files_in_the_run(world, tmp_path, monkeypatch):
    """Offline: no login, no network, nothing outside the run's folder."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    folder = train(world, tmp_path / "run", **{"run.tracker": "wandb", "run.project": "trial"})
    assert wandb.run.settings.mode == "offline" and wandb.run.project == "trial"
    logged = dict(wandb.run.summary)
    wandb.finish()
    last = metrics(folder)[-1]
    for key in ("loss", "grad_norm_proxyv", "tokens_per_second", "supervised_share"):
        assert logged[f"train/{key}"] == pytest.approx(last[key])
    [kept] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # its own process writes it, on a busy machine some time later
    while kept.stat().st_size <= 1000 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kept.stat().st_size > 1000


def test_tensorboard_keeps_its_files_in_the_run(world, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    folder = train(world, tmp_path / "run", **{"run.tracker": "tensorboard"})
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for key in ("loss", "grad_norm_proxyv", "tokens_per_second", "supervised_share"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        expected = [(entry["step"], entry[key]) for entry in metrics(folder)]
        assert found == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected]


@pytest.mark.parametrize("limit", [0.0, 0.1, 100.0])
def test_group_norms_are_those_before_clipping(limit):
    one, two = (
        torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n)))
        for n in (3, 5)
    )
    groups = [{"params": [one], "name": "a"}, {"params": [two], "name": "b"}]
    optimizer = torch.optim.AdamW(groups)
    norms = GroupNorms(optimizer, lambda: True)
    (one.pow(2).sum() + two.pow(3).sum()).backward()
    expected = {"a": one.grad.norm().item(), "b": two.grad.norm().item()}
    total = torch.nn.utils.clip_grad_norm_([one, two], limit or float("inf")).item()
    optimizer.step()
    assert norms.before_clipping(total, limit, None) == pytest.approx(expected, rel=1e-4)
    assert norms.before_clipping(total, limit, None) == {"a": 0.0, "b": 0.0}
