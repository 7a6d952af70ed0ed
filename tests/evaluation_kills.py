"""Kill an evaluation again and again, and compare with the same evaluation left alone.

    python tests/evaluation_kills.py --model DIR --data DIR --tasks docvqa,chartqa --kills 3

Each kill is SIGKILL; then the same command starts again. Kills are spread over the samples, each
while the run still has some to ask. Exits with 1 where files or scores differ.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def launch(command: Sequence[str], output: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "proxyv.eval", *command, "--output", str(output)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def answered(output: Path) -> int:
    """Whole lines in the files of answers."""
    return sum(path.read_bytes().count(b"\n") for path in output.glob("*.jsonl"))


def kill_when(process: subprocess.Popen, output: Path, goal: int) -> int:
    """Kill the run once it has ``goal`` answers; how many it had."""
    while answered(output) < goal:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before {goal} answers")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended with {process.returncode} and was not killed")
    return answered(output)


def finish(command: Sequence[str], output: Path) -> dict[str, Any]:
    """Let a run end; its scores by task."""
    code = launch(command, output).wait()
    if code:
        raise SystemExit(f"the run in {output} ended with {code}")
    tasks = json.loads((output / "results.json").read_text("utf-8"))["tasks"]
    return {name: (task["samples"], task["scores"]) for name, task in tasks.items()}


def disturb(command: Sequence[str], folder: Path, kills: int) -> list[str]:
    """Run undisturbed, then with kills; one line for each thing in which they differ."""
    whole, parts = folder / "whole", folder / "parts"
    expected = finish(command, whole)
    count = answered(whole)
    print(f"undisturbed: {count} samples, {json.dumps(expected)}", flush=True)
    for number in range(1, kills + 1):
        had = kill_when(launch(command, parts), parts, number * count // (kills + 1))
        print(f"killed with {had} answers", flush=True)
        if had >= count:
            raise SystemExit("the run had no sample left to ask when it was killed")
    found = finish(command, parts)
    differing = [f"scores of {name}" for name in expected if found.get(name) != expected[name]]
    for path in sorted(whole.glob("*.jsonl")):
        if path.read_bytes() != (parts / path.name).read_bytes():
            differing.append(path.name)
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="folder with a folder for each task")
    parser.add_argument("--tasks", default="docvqa,chartqa", help="default docvqa,chartqa")
    parser.add_argument("--kills", type=int, default=3, help="default 3")
    args = parser.parse_args()
    command = ["--model", os.path.abspath(args.model), "--data", os.path.abspath(args.data)]
    command += ["--tasks", args.tasks, "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        differing = disturb(command, Path(folder), args.kills)
    print(f"different: {', '.join(differing)}" if differing else "files and scores are equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
