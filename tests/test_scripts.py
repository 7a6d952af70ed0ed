"""The scripts' own words: help, and mistakes that end them before anything is installed or run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run(name: str, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with no program on the path but the shell's own, from another folder."""
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PROXYV_ENV": ""}
    command = ["bash", str(SCRIPTS / f"{name}.sh"), *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    "name", ["benchmark", "lmms_env", "quickstart", "reproduce", "stage0", "test"]
)
def test_help_is_the_comment_that_a_script_begins_with(
    name: str, flag: str, tmp_path: Path
) -> None:
    done = run(name, flag, folder=tmp_path)
    lines = (SCRIPTS / f"{name}.sh").read_text().splitlines()
    written = lines[1 : next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [line[2:] for line in written]
    assert any(f"bash scripts/{name}.sh" in line for line in written)  # an example
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_with_2(tmp_path: Path) -> None:
    done = run("quickstart", "start_layer", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'start_layer' is no override; write section.name=value")
