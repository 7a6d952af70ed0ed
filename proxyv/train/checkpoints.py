"""Checkpoints that are either complete or not there.

A checkpoint is written into a hidden folder, given a manifest with the SHA-256 of every file, and
renamed in one step, so a run that is killed at any moment leaves the previous one as it was. It
is read only after every checksum has been computed anew.

Source: no counterpart; the authors' stage-1 checkpoints cannot be resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from proxyv.train.ranks import gather, rank, world_size

__all__ = ["MANIFEST", "CheckpointError", "Checkpoints", "find_checkpoints"]

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK_BYTES = 1 << 22


class CheckpointError(ValueError):
    """Checkpoints are there, but a run cannot go on from any of them."""


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint in a run's folder, oldest first; none is opened."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


class Checkpoints:
    """The checkpoints of a run. Every rank makes one and calls the same methods.

    Args:
        folder: of the run, shared by all ranks.
        keep: how many complete checkpoints to keep.
        identity: settings that shape the run; a checkpoint of another run is refused.
        say: where messages go (first rank only).
        data: what the rows are known by; a checkpoint of a run over others is refused, but not one
            that says nothing of them, as older ones do.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        identity: dict[str, Any],
        say: Callable[[str], Any] = print,
        *,
        data: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.keep = folder, keep
        self.identity, self.data = json.loads(json.dumps([identity, data or {}]))
        self._say = say if rank() == 0 else (lambda _: None)

    def latest(self) -> Path | None:
        """The newest checkpoint that is complete, or None where there is none at all.

        Raises:
            CheckpointError: there are some but none is complete, or it belongs to other settings.
        """
        faults: list[str] = []
        for step, path in reversed(find_checkpoints(self.folder)):
            fault = self._fault(path)
            if fault is None:
                if faults:
                    self._say(f"note: passed over {'; '.join(faults)}; going on from step {step}")
                self._check_identity(path)
                return path
            faults.append(f"{path.name}: {fault}")
        if faults:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is complete ({'; '.join(faults)}): restore one, "
                "or set run.resume=false to begin anew"
            )
        return None

    def _fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; the ranks share the work and agree."""
        fault = None
        try:
            entries = _read_manifest(path)["files"]
            for name in sorted(entries)[rank() :: world_size()]:
                file, entry = path / name, entries[name]
                if not file.is_file():
                    fault = f"{name} is missing"
                elif file.stat().st_size != entry["bytes"]:
                    fault = f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
                elif _sha256(file) != entry["sha256"]:
                    fault = f"{name} does not have its checksum"
                if fault:
                    break
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"no readable {MANIFEST} ({error})"
        return next((each for each in gather(fault) if each is not None), None)

    def _check_identity(self, path: Path) -> None:
        manifest = _read_manifest(path)
        if changed := _differences(manifest["identity"], self.identity):
            raise CheckpointError(
                f"{path} belongs to a run with other settings ({changed}): use the "
                "same ones to go on, another run.output_dir, or run.resume=false to begin anew"
            )
        if changed := _differences(manifest.get("data", self.data), self.data):
            raise CheckpointError(
                f"{path} belongs to a run over other rows ({changed}): put back what was in "
                "data.annotations to go on, use another run.output_dir, or run.resume=false to "
                "begin anew"
            )

    def write(self, step: int, fill: Callable[[Path], None], needed_bytes: int = 0) -> bool:
        """Make the checkpoint of a step; every rank calls it.

        Args:
            step: number of optimiser steps done.
            fill: writes this rank's files into the folder that it is given.
            needed_bytes: what all files will take; where less is free, nothing is begun.

        Returns:
            Whether the checkpoint is complete. If it is not, for want of space or permission, all
            ranks learn so, the message says it, and the previous checkpoint is untouched.
        """
        final = self.folder / f"checkpoint-{step}"
        partial = self.folder / f".{final.name}.partial"
        steps: tuple[Callable[[], Any], ...] = (
            lambda: self._begin(partial, needed_bytes) if rank() == 0 else None,
            lambda: fill(partial),
            lambda: _hash_share(partial),
        )
        entries: dict[str, Any] = {}
        for action in steps:
            fault, value = _attempt(action)
            answers = gather((fault, value))
            if self._abandon([each for each, _ in answers], partial, step):
                return False
            entries = {name: entry for _, part in answers if part for name, entry in part.items()}
        fault, _ = _attempt(
            lambda: self._commit(step, partial, final, entries) if rank() == 0 else None
        )
        return not self._abandon(gather(fault), partial, step)

    def _begin(self, partial: Path, needed_bytes: int) -> None:
        self.remove_partial()
        partial.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed_bytes:
            raise OSError(f"{needed_bytes:,} bytes needed, {free:,} free on the disk")

    def _commit(self, step: int, partial: Path, final: Path, entries: dict[str, Any]) -> None:
        manifest = {"identity": self.identity, "data": self.data, "files": entries}
        with open(partial / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():  # passed over before, for it was damaged
            _remove(final)
        os.rename(partial, final)
        _sync_folder(self.folder)
        # Later ones are there only where the run went back over them, for they were damaged.
        found = sorted(find_checkpoints(self.folder), key=lambda entry: entry[0] <= step)
        for _, path in found[: -self.keep]:
            _remove(path)

    def _abandon(self, faults: list[str | None], partial: Path, step: int) -> bool:
        fault = next((each for each in faults if each is not None), None)
        if fault is None:
            return False
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        left = find_checkpoints(self.folder)
        last = f"{left[-1][1]} is the last complete one" if left else "there is none before it"
        self._say(f"warning: the checkpoint of step {step} was not saved: {fault}; {last}")
        return True

    def remove_partial(self) -> None:
        """Remove what killed or failed saves left behind (first rank only)."""
        for pattern in (".checkpoint-*.partial", ".checkpoint-*.removed"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def clear(self) -> None:
        """Remove all checkpoints (first rank only): of a run that is complete, or begun anew."""
        self.remove_partial()
        for _, path in find_checkpoints(self.folder):
            _remove(path)


def _differences(written: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What was written otherwise than it is wanted now, in words."""
    return "; ".join(
        f"{key}={written.get(key)} then, {wanted.get(key)} now"
        for key in sorted(written.keys() | wanted.keys())
        if written.get(key) != wanted.get(key)
    )


def _attempt(action: Callable[[], Any]) -> tuple[str | None, Any]:
    """What went wrong with writing, or None, and the result; other errors pass."""
    try:
        return None, action()
    except (OSError, SafetensorError) as error:
        return str(error), None
    except RuntimeError as error:  # torch.save's stream says so when a file cannot grow
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        return "a file could not be written (is the disk full?)", None


def _hash_share(partial: Path) -> dict[str, Any]:
    """Size and checksum of this rank's share of the files, which are on the disk after it."""
    names = sorted(
        path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()
    )
    entries = {}
    for name in names[rank() :: world_size()]:
        path = partial / name
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path, sync=True)}
    return entries


def _sha256(path: Path, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that half of it never has its name."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)
