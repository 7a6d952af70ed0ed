"""The processes that share one evaluation, as ``accelerate launch`` or ``torchrun`` start them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["ALONE", "Team", "join_team", "own_gpu"]

PATIENCE = datetime.timedelta(hours=12)  # a process may wait so long for the slowest one


def _no_wait() -> None:
    return None


@dataclass(frozen=True)
class Team:
    """One of the processes.

    Attributes:
        rank: its number, from 0 on.
        size: how many there are.
        local_rank: its number on this machine.
        wait: returns when every process has come as far.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    wait: Callable[[], None] = _no_wait

    @property
    def is_first(self) -> bool:
        """Whether this process writes what belongs to all."""
        return self.rank == 0


ALONE = Team()


def join_team(device: str | None) -> Team:
    """Meet the other processes; a command that was started plainly is alone.

    Args:
        device: what the user asked for, None for the usual one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    cpu = (device or "").startswith("cpu") or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    return Team(
        state.process_index,
        state.num_processes,
        state.local_process_index,
        state.wait_for_everyone,
    )


def own_gpu(team: Team) -> str | None:
    """The GPU of one of several processes, None to take the usual device."""
    return f"cuda:{team.local_rank}" if team.size > 1 and torch.cuda.is_available() else None
