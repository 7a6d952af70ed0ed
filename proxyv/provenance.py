"""What a number depends on: versions, commit, hardware, and the weights themselves."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["fingerprint", "git_commit", "hardware", "short_commit", "versions"]

PACKAGES = (
    *("torch", "transformers", "tokenizers", "accelerate", "datasets"),
    *("rapidfuzz", "nltk", "jieba", "pillow", "numpy"),
)
MODEL_FILES = (
    *("config.json", "*_config.json", "tokenizer*", "vocab.json", "merges.txt", "*.jinja"),
    *("*.model", "*.safetensors", "*model*.bin"),  # and not training_args.bin, optimizer.bin
)
_CODE = (":(top)", ":(top,exclude)docs")
PIECE_BYTES = 1 << 16
PIECES = 64


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence a score, as far as they are there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # jieba, which serves pages in Chinese only
    return found


def git_commit() -> str | None:
    """Commit of this code, with ``+changes`` where files differ; None outside a checkout.

    Files in ``docs`` do not count: a report that is made again would mark itself.

    A copy of the code without its history says its commit in ``PROXYV_COMMIT``.
    """
    if "PROXYV_COMMIT" in os.environ:
        return os.environ["PROXYV_COMMIT"]
    file = Path(__file__).resolve()
    folder = file.parent
    try:
        _git(folder, "ls-files", "--error-unmatch", file.name)  # not inside someone else's checkout
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def short_commit(commit: str | None) -> str:
    """What `git_commit` said, with ten digits; ``unknown`` where it knew none."""
    return "unknown" if commit is None else commit[:10] + commit[40:]


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def hardware(device: torch.device) -> dict[str, Any]:
    """The device that ran the model, and its host."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads()}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fingerprint(folder: Path) -> str:
    """Name the content of a model folder.

    Small files count whole; of weight files the size and 64 pieces spread over the file, because
    training changes all of a tensor and reading many gigabytes would take minutes.
    """
    digest = hashlib.sha256()
    for path in sorted({path for name in MODEL_FILES for path in folder.glob(name)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            if size <= PIECES * PIECE_BYTES:
                digest.update(stream.read())
                continue
            for piece in range(PIECES):
                stream.seek(piece * (size - PIECE_BYTES) // (PIECES - 1))
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()[:16]
