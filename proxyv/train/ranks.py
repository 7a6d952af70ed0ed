"""The ranks of a run, as far as torch has joined them: a single process is rank 0 of 1."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["gather", "rank", "world_size"]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this rank."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if _joined() else 1


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of ranks, on every rank; all ranks wait for each other."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
