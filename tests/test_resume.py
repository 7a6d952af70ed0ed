"""No run is lost: killed, told to stop, out of disk, or with a damaged checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import make_backbones, make_rows, overrides
from transformers import TrainerCallback

from proxyv.data import scan
from proxyv.train import run
from proxyv.train.checkpoints import MANIFEST, CheckpointError, Checkpoints, find_checkpoints
from proxyv.train.config_files import load_settings
from proxyv.train.settings import Settings
from proxyv.train.signals import Interrupted

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_backbones(folder)
    make_rows(folder, 8, text_only=4)
    return folder


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def settings_for(world: Path, folder: Path, **more: object) -> Settings:
    values = {
        "run.output_dir": folder,
        "optim.max_steps": STEPS,  # of 3 steps a pass
        "model.dtype": "float32",
        "deepspeed.config": "null",
        "run.save_steps": 2,
        "run.keep_checkpoints": 2,
        **more,
    }
    return load_settings(ROOT / "configs/tiny/pretrain.yaml", overrides(world, **values))


def metrics(folder: Path) -> list[dict]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    fixed = ("step", "loss", "grad_norm", "learning_rate", "supervised_share")
    return [{key: entry[key] for key in fixed} for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run.train(settings_for(world, tmp_path_factory.mktemp("runs") / "whole"))


def check_same(folder: Path, whole: Path) -> None:
    """The same losses, line by line, and the same weights, bit by bit."""
    assert metrics(folder) == metrics(whole)
    one, other = (load_file(path / "model.safetensors") for path in (folder, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


class At(TrainerCallback):
    """Calls something at the end of a step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def train_with(monkeypatch, settings: Settings, callback: TrainerCallback) -> Path:
    with monkeypatch.context() as patch:
        make = run.Progress
        patch.setattr(run, "Progress", lambda: [make(), callback][1])
        return run.train(settings)


def test_sigterm_saves_and_the_same_run_goes_on(world, uninterrupted, tmp_path, monkeypatch):
    settings = settings_for(world, tmp_path, **{"run.save_steps": 0})
    told = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="signal 15 after step") as caught:
        train_with(monkeypatch, settings, told)
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    [(step, path)] = find_checkpoints(tmp_path)
    assert step in (3, 4)
    assert not (tmp_path / run.FINISHED).exists()
    saved = load_file(path / "trained.safetensors")
    assert saved and not [name for name in saved if "q_proj" in name or "vision_tower" in name]
    size = sum(value.numel() for value in saved.values())
    assert sum(file.stat().st_size for file in path.iterdir()) < 3 * 4 * size + 60_000
    run.train(settings)
    check_same(tmp_path, uninterrupted)
    assert not find_checkpoints(tmp_path)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_stopped_in_its_last_step_is_only_saved(world, tmp_path, monkeypatch):
    """Five steps of three a pass, at a rate at which a sixth would show."""
    constant = {"optim.max_steps": 5, "optim.schedule": "constant", "optim.warmup_ratio": 0}
    whole = run.train(settings_for(world, tmp_path / "whole", **constant))
    settings = settings_for(world, tmp_path / "run", **constant)
    with pytest.raises(Interrupted, match="after step 5; the same command goes on from step 5"):
        train_with(monkeypatch, settings, At(5, sigterm))
    run.train(settings)
    check_same(tmp_path / "run", whole)
    one, other = (json.loads((f / run.FINISHED).read_text()) for f in (whole, tmp_path / "run"))
    assert one["steps"] == other["steps"] == 5


def test_a_signal_after_the_last_step_ends_nothing(world, tmp_path, uninterrupted, monkeypatch):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            sigterm()

    train_with(monkeypatch, settings_for(world, tmp_path, **{"run.save_steps": 0}), Late())
    check_same(tmp_path, uninterrupted)


def test_how_often_to_log_and_to_save_may_change(world, tmp_path, monkeypatch, uninterrupted):
    rarely = settings_for(world, tmp_path, **{"run.log_steps": 3, "run.save_steps": 0})
    with pytest.raises(Interrupted):
        train_with(monkeypatch, rarely, At(3, sigterm))
    written = []
    write = Checkpoints.write
    monkeypatch.setattr(
        Checkpoints,
        "write",
        lambda self, step, *a, **k: written.append(step) or write(self, step, *a, **k),
    )
    run.train(settings_for(world, tmp_path))
    assert written == [4, 6]
    assert [entry["step"] for entry in metrics(tmp_path)] == [3, 4, 5, 6]
    assert metrics(tmp_path)[1:] == metrics(uninterrupted)[3:]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for entry in (entry for entry in map(json.loads, lines) if "loss" in entry):
        parts = [value for key, value in entry.items() if key.startswith("grad_norm_")]
        assert sum(norm**2 for norm in parts) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-4)
    means = [json.loads((f / run.FINISHED).read_text())["loss"] for f in (tmp_path, uninterrupted)]
    assert means[0] == pytest.approx(means[1], abs=1e-3)


def test_a_row_that_can_be_used_again_does_not_change_the_order(world, tmp_path, monkeypatch):
    """By length it stands elsewhere: some rows would come twice, and others never."""
    rows = json.loads((world / "rows.json").read_text())
    rows[0]["image"] = "images/late.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    images = tmp_path / "images"
    images.symlink_to(world / "images")
    values = {
        "data.annotations": tmp_path / "rows.json", "data.on_failure": "skip",
        "data.follow_links": True, "data.images": tmp_path, "data.group_by_length": True,
        "optim.max_steps": 3,
    }  # fmt: skip
    seen: list[int] = []
    read = run.ConversationDataset.__getitem__
    monkeypatch.setattr(
        run.ConversationDataset, "__getitem__", lambda self, i: seen.append(int(i)) or read(self, i)
    )
    late = world / "images/late.png"
    settings = settings_for(world, tmp_path / "run", **values)
    with pytest.raises(Interrupted):
        train_with(monkeypatch, settings, At(1, sigterm))
    first = seen[:4]
    seen.clear()
    late.write_bytes((world / "images/0.png").read_bytes())
    try:
        run.train(settings)
    finally:
        late.unlink()
    assert sorted(first + seen) == list(range(12))


def test_a_run_that_does_not_go_on_has_an_order_of_its_own(world, tmp_path):
    settings = settings_for(world, tmp_path)
    np.savez(tmp_path / run.ORDER, lengths=[3, 4], has_image=[True, False])
    assert run._begun_with(settings) is None  # nothing to go on from
    (tmp_path / "checkpoint-2").mkdir()
    assert [part.tolist() for part in run._begun_with(settings)] == [[3, 4], [True, False]]
    settings.run.resume = False
    assert run._begun_with(settings) is None
    settings.run.resume = True
    (tmp_path / run.FINISHED).touch()
    assert run._begun_with(settings) is None


def test_rows_left_out_are_those_of_this_run(world, tmp_path):
    """Also where it replaces a finished one, whose rows were others or were left out too."""
    rows = json.loads((world / "rows.json").read_text())
    rows[0]["image"] = "images/gone.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    values = {
        "data.annotations": tmp_path / "rows.json", "data.on_failure": "skip",
        "optim.max_steps": 3, "run.overwrite": True,
    }  # fmt: skip
    failed = []
    for _ in range(2):
        run.train(settings_for(world, tmp_path / "run", **values))
        entries = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        failed.append([e["failed_rows"] for e in map(json.loads, entries) if "loss" in e][-1])
    assert failed == [1, 1]
    (tmp_path / "rows.json").write_text((world / "rows.json").read_text())
    run.train(settings_for(world, tmp_path / "run", **values))
    assert not (tmp_path / "run/failures.txt").exists()


def in_child(settings: Settings) -> multiprocessing.Process:
    """The run in a process of its own, which may be killed."""
    child = multiprocessing.get_context("fork").Process(target=run.train, args=(settings,))
    child.start()
    return child


def wait_for(condition, child: multiprocessing.Process) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert child.is_alive() and time.monotonic() < end
        time.sleep(0.001)


def test_kill_at_any_moment_loses_nothing(world, uninterrupted, tmp_path):
    settings = settings_for(world, tmp_path)

    def steps() -> int:
        path = tmp_path / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    moments = [
        lambda: list(tmp_path.glob(".checkpoint-2.partial/*")),  # while saving, nothing before
        lambda: (tmp_path / "checkpoint-2").exists() and steps() >= 3,
        lambda: list(tmp_path.glob(".checkpoint-4.partial/*")),
        lambda: list(tmp_path.glob(".partial/*")),  # while the finished model is written
    ]
    for moment in moments:
        child = in_child(settings)
        wait_for(moment, child)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (tmp_path / run.FINISHED).exists()
    run.train(settings)
    check_same(tmp_path, uninterrupted)


@pytest.fixture
def stopped(world, tmp_path, monkeypatch) -> Settings:
    """A run with checkpoints of steps 2 and 4."""
    settings = settings_for(world, tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train_with(monkeypatch, settings, At(5, lambda: 1 / 0))
    assert [step for step, _ in find_checkpoints(tmp_path / "run")] == [2, 4]
    return settings


def test_a_damaged_checkpoint_is_passed_over(stopped, uninterrupted, tmp_path, capsys):
    folder = tmp_path / "run"
    damaged = folder / "checkpoint-4" / "trained.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    run.train(stopped)
    said = capsys.readouterr().out
    assert "checkpoint-4: trained.safetensors does not have its checksum; going on from" in said
    assert f"going on from {folder / 'checkpoint-2'}" in said
    check_same(folder, uninterrupted)


def test_no_complete_checkpoint_is_an_error_and_no_new_beginning(stopped, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    (folder / "checkpoint-2" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing.*run\.resume=false"):
        run.train(stopped)
    stopped.run.resume = False
    run.train(stopped)
    assert (folder / run.FINISHED).is_file()


def test_other_settings_do_not_go_on(stopped):
    before, stopped.optim.lr = stopped.optim.lr, 0.5
    changed = re.escape(f"optim.lr={before} then, 0.5 now")
    with pytest.raises(CheckpointError, match=changed + ".*output_dir"):
        run.train(stopped)


@pytest.mark.parametrize("change", ["fewer", "order"])
def test_other_rows_do_not_go_on(world, tmp_path, uninterrupted, monkeypatch, change):
    path, text = tmp_path / "rows.json", (world / "rows.json").read_text()
    path.write_text(text)
    settings = settings_for(world, tmp_path / "run", **{"data.annotations": path})
    with pytest.raises(ZeroDivisionError):
        train_with(monkeypatch, settings, At(5, lambda: 1 / 0))
    rows = json.loads(text)
    path.write_text(json.dumps(rows[4:] if change == "fewer" else rows[::-1]))
    said = "rows=12 then, 8 now" if change == "fewer" else r"\(fingerprint=\w+ then, \w+ now\)"
    with pytest.raises(CheckpointError, match=f"over other rows .*{said}.*put back what was"):
        run.train(settings)
    path.write_text(text)
    run.train(settings)
    check_same(tmp_path / "run", uninterrupted)


def test_a_checkpoint_that_says_nothing_of_its_rows_goes_on(stopped, tmp_path, uninterrupted):
    """As those of earlier versions of this package."""
    for _, path in find_checkpoints(tmp_path / "run"):
        manifest = json.loads((path / MANIFEST).read_text())
        assert manifest.pop("data")["rows"] == 12
        (path / MANIFEST).write_text(json.dumps(manifest))
    run.train(stopped)
    check_same(tmp_path / "run", uninterrupted)


def test_a_full_disk_leaves_the_previous_checkpoint(
    world, uninterrupted, tmp_path, monkeypatch, capsys
):
    """Files may not grow beyond a limit from step 3 on, and may again from step 5 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"
    seen = []

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            if state.global_step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                seen.extend(path.name for path in folder.glob(".check*"))
                seen.extend(path.name for _, path in find_checkpoints(folder))

    try:
        train_with(monkeypatch, settings_for(world, folder), Full())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().out
    assert "warning: the checkpoint of step 4 was not saved: " in said
    assert "checkpoint-2 is the last complete one" in said
    assert seen == ["checkpoint-2"]
    check_same(folder, uninterrupted)


def test_a_run_that_cannot_save_when_it_is_told_to_stop_says_so(world, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_and_told() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        sigterm()

    settings = settings_for(world, tmp_path, **{"run.save_steps": 0})
    try:
        with pytest.raises(Interrupted, match=r"begins anew, for no checkpoint could be saved$"):
            train_with(monkeypatch, settings, At(2, full_and_told))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_checkpoint_just_written_is_kept_and_damaged_later_ones_go_first(tmp_path):
    def write(step: int, keep: int) -> None:
        assert Checkpoints(tmp_path, keep, {}).write(
            step, lambda f: (f / "a").write_bytes(b"1") and None
        )

    for step in (200, 300):
        write(step, keep=3)
    (tmp_path / "checkpoint-300/a").unlink()
    write(250, keep=2)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [200, 250]
    (tmp_path / "checkpoint-250/a").unlink()
    write(225, keep=1)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [225]


def test_too_little_space_is_known_before_writing(tmp_path):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 1, {}, said.append)
    assert checkpoints.write(1, lambda folder: (folder / "a").write_bytes(b"1") and None)
    assert not checkpoints.write(2, lambda folder: pytest.fail("written"), needed_bytes=1 << 60)
    assert "1,152,921,504,606,846,976 bytes needed" in said[0] and "checkpoint-1" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoints.write(3, lambda folder: (folder / "a").write_bytes(b"3") and None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_sigterm_to_the_command_saves_though_every_process_gets_it(world, tmp_path):
    """A launcher passes the signal on to the process group, workers of the loader included."""
    folder, log = tmp_path / "run", tmp_path / "log"
    values = {"run.output_dir": folder, "optim.max_steps": 5000, "deepspeed.config": "null"}
    words = ["--config", "configs/tiny/pretrain.yaml"]
    words += overrides(world, **values, **{"data.workers": 1, "run.save_steps": 0})
    with open(log, "w", encoding="utf-8") as file:
        command = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "proxyv.train",
                "--config",
                "configs/tiny/pretrain.yaml",
                *words,
            ],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=file,
        )
    while not (folder / "metrics.jsonl").is_file() and command.poll() is None:
        time.sleep(0.1)
    command.terminate()
    assert command.wait(timeout=120) == 128 + signal.SIGTERM, log.read_text()
    assert "stopped by signal 15 after step" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert len(find_checkpoints(folder)) == 1


def test_sigterm_in_the_look_at_the_rows_keeps_what_was_seen(world, tmp_path, monkeypatch):
    settings = settings_for(world, tmp_path / "run", **{"data.group_by_length": True})
    seen: list[int] = []
    measure = run.ConversationDataset.measure

    def told_at_the_fifth(self, index):
        seen.append(index)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, index)

    monkeypatch.setattr(scan, "_BATCH", 2)
    monkeypatch.setattr(run.ConversationDataset, "measure", told_at_the_fifth)
    with pytest.raises(Interrupted, match="look at the rows, broken off after 6 of 12") as caught:
        run.train(settings)
    assert caught.value.number == signal.SIGTERM and not (tmp_path / "run").exists()
    run.train(settings)
    assert seen == list(range(12))


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_twenty_kills_of_the_real_command():
    done = subprocess.run(
        [sys.executable, "kills.py", "--kills", "20", "--while-saving", "10"],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert int(verdict.split(" kills, ")[1].split()[0]) >= 5, verdict
