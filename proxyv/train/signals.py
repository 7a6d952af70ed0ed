"""A run that is told to go saves first: SIGTERM is how clusters take a machine back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from proxyv.train.ranks import world_size

__all__ = ["Interrupted", "StopOnSignal", "start_worker"]


class Interrupted(Exception):
    """A run has saved and stopped because of a signal.

    Attributes:
        number: of the signal; a process ends with 128 + number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which any rank got SIGTERM.

    Attributes:
        received: number of the signal; 0 for none.
        stopped: whether the run ends because of it. One that comes after the last step ends
            nothing any more.
    """

    def __init__(self) -> None:
        self.received = 0
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signal in place of dying of it."""
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Agree with the other ranks, and end the run if one has to go."""
        if world_size() > 1:
            flag = torch.tensor(self.received, device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.received = int(flag)
        if self.received:
            self.stopped = control.should_save = control.should_training_stop = True


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Start a worker of a loader in a process group of its own.

    Launchers send SIGTERM to the group of a rank. The rank answers it, and without its workers it
    could not finish the step. They still end when it tells them to, or when it is gone.
    """
    os.setpgid(0, 0)
    if then is not None:
        then(worker)
