"""The processes that share one evaluation, as ``accelerate launch`` or ``torchrun`` start them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ALONE", "Team", "join_team"]

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


def join_team(cpu: bool) -> Team:
    """Meet the other processes; a command that was started plainly is alone.

    Args:
        cpu: whether the model runs on the CPU even where there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=PATIENCE)
    return Team(
        state.process_index,
        state.num_processes,
        state.local_process_index,
        state.wait_for_everyone,
    )
