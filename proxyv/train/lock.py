"""One run in a folder at a time."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Busy", "only_run"]

_NAME = ".lock"


class Busy(ValueError):
    """Another run holds the folder."""


@contextmanager
def only_run(folder: Path, wait_seconds: float = 60.0) -> Iterator[None]:
    """Hold a run's folder; the system lets go of it when this process ends, however it ends.

    Processes that were forked meanwhile (workers of a loader) hold it too until they end, if this
    one is killed; they notice that within seconds.

    Args:
        folder: made if it is not there.
        wait_seconds: how long a run that is just dying may take.

    Raises:
        Busy: another run does not let go of the folder.
        OSError: the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _NAME, "w", encoding="utf-8") as file:
        end = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Busy(
                        f"run.output_dir: another run is at work in {folder}; stop it, or give "
                        "this one another folder"
                    ) from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # for workers that are still there as well
