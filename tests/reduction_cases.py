"""Finding the reference outputs of token-reduction methods, for the tests that read them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from golden import golden_files
from safetensors.torch import load_file
from torch import Tensor


def golden_cases(name: str) -> list:
    """Parameters for the files ``*_NAME.safetensors``, or one that is skipped."""
    files = golden_files(f"reduction/*_{name}.safetensors")
    if not files:
        reason = f"PROXYV_GOLDEN names no folder with reduction/*_{name}.safetensors"
        return [pytest.param(None, marks=[pytest.mark.golden, pytest.mark.skip(reason)], id="none")]
    return [pytest.param(path, marks=pytest.mark.golden, id=path.stem) for path in files]


def settings_of(path: Path, pattern: str) -> list[list[int]]:
    """The numbers in the prefixes of a file's tensors that fit a pattern: its settings."""
    found = {match.groups() for name in load_file(path) if (match := re.match(pattern, name))}
    assert found, f"{path} holds no tensor {pattern}"
    return sorted([int(number) for number in numbers] for numbers in found)


def read(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names start with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(path).items()
        if name.startswith(prefix)
    }


def sister(path: Path, old: str, new: str) -> Path:
    """The file of another name in the same set."""
    return path.with_name(path.name.replace(f"_{old}.", f"_{new}."))
