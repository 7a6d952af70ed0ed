"""Rows that were left out of training: counted, and listed by name in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FailureLog"]


class FailureLog:
    """A file with one line for each row left out, over all ranks and restarts of a run.

    Every rank adds the ``failures`` of its batches (see ``Collator``). A line is appended in one
    write, so ranks that share the file do not mix theirs; a rank that meets a row again, in a
    later pass or after a restart, does not write it twice.

    Args:
        path: the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._known = set(known)

    def __len__(self) -> int:
        """Rows that this rank knows to have been left out."""
        return len(self._known)

    def forget(self, remove: bool) -> None:
        """Forget all, for the run begins anew; one rank also removes the file."""
        self._known.clear()
        if remove:
            self.path.unlink(missing_ok=True)

    def add(self, failures: Iterable[str]) -> list[str]:
        """Note rows left out; gives those that were not known before."""
        new = []
        for failure in failures:
            line = " ".join(failure.split())
            if line not in self._known:
                self._known.add(line)
                new.append(line)
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                for line in new:
                    os.write(file, f"{line}\n".encode())
            finally:
                os.close(file)
        return new
