"""Kill a training again and again, and compare with the same training left alone.

    python tests/kills.py --kills 20 --while-saving 10 --steps 1200

Each kill is SIGKILL to the launcher, with which its rank dies; then the same command starts again.
Kills are uniform over the steps, and the wanted number of them hits a save. The run has made its
first step before the clock starts. Exits with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_training import make_backbones, make_rows, overrides

ROOT = Path(__file__).resolve().parents[1]


def start(world: Path, folder: Path, steps: int, save: int) -> subprocess.Popen:
    values = {
        "run.output_dir": folder,
        "run.save_steps": save,
        "optim.max_steps": steps,
        "optim.global_batch": 8,
        "optim.micro_batch": 2,
        "model.dtype": "float32",
        "deepspeed.config": "null",
    }
    words = ["--config", "configs/tiny/pretrain.yaml", *overrides(world, **values)]
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "proxyv.train", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def last_step(folder: Path, since: float = 0.0) -> int:
    """The last step logged by a run that began after ``since``."""
    path = folder / "metrics.jsonl"
    if path.is_file() and path.stat().st_mtime < since:
        return 0
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def saving(folder: Path) -> bool:
    return any(folder.glob(".checkpoint-*.partial/*"))


def wait(process: subprocess.Popen, condition, what: str) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before {what}")
        time.sleep(0.0005)


def kill(process: subprocess.Popen, folder: Path) -> bool:
    """Kill the run; whether it was saving."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = [int(pid) for pid in children.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(alive(pid) for pid in ranks):  # they die with their launcher
        time.sleep(0.01)
    return saving(folder)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def losses(folder: Path) -> list[tuple[int, float, float]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        (entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--while-saving", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--save-steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="proxyv-kills-"))
    make_backbones(work)
    make_rows(work, 8, text_only=4)
    whole, torn = work / "whole", work / "torn"
    process = start(work, whole, options.steps, options.save_steps)
    wait(process, lambda: last_step(whole) >= 1, "its first step")
    began = time.monotonic()
    if process.wait():
        raise SystemExit("the uninterrupted run failed")
    print(f"uninterrupted: {options.steps} steps in {time.monotonic() - began:.0f} s", flush=True)

    generator = random.Random(options.seed)
    moments = sorted(
        generator.uniform(1, options.steps - 2 * options.save_steps) for _ in range(options.kills)
    )
    to_save = set(generator.sample(range(options.kills), options.while_saving))
    saves = 0
    for number, moment in enumerate(moments):
        since = time.time()
        process = start(work, torn, options.steps, options.save_steps)
        wait(process, lambda at=moment, s=since: last_step(torn, s) >= at, f"step {moment:.0f}")
        if number in to_save:
            wait(process, lambda: saving(torn), "a save")
            time.sleep(generator.uniform(0, 0.003))
        else:
            time.sleep(generator.uniform(0, 0.3))
        hit = kill(process, torn)
        saves += hit
        kept = sorted(path.name for path in torn.glob("checkpoint-*"))
        print(
            f"kill {number + 1} at step {last_step(torn)}{', saving' * hit}; kept {kept}",
            flush=True,
        )
    process = start(work, torn, options.steps, options.save_steps)
    if process.wait():
        raise SystemExit(f"the last run failed: see {torn.with_suffix('.log')}")
    one, other = (load_file(path / "model.safetensors") for path in (whole, torn))
    weights = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    same = losses(whole) == losses(torn)
    print(
        f"{options.kills} kills, {saves} while saving: weights equal {weights}, losses equal {same}"
    )
    return 0 if weights and same else 1


if __name__ == "__main__":
    sys.exit(main())
