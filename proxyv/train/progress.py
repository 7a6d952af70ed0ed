"""What a run shows and writes while it goes: a progress bar, and ``metrics.jsonl``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from proxyv.files import write_text

__all__ = ["MetricsFile", "Progress"]

_SECONDS = 10.0


class Progress(TrainerCallback):
    """A bar with loss, learning rate, speed and share of supervised tokens (first rank only).

    Where the output is no terminal, a line is printed every ten seconds instead.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._printed = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True)
            self._bar.update(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        text = describe(logs)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now, last = time.monotonic(), state.global_step == state.max_steps
        if last or now - self._printed >= _SECONDS:
            print(f"step {state.global_step}/{state.max_steps}  {text}", flush=True)
            self._printed = now

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def describe(logs: dict[str, float]) -> str:
    """One line of a log entry."""
    return (
        f"loss {logs['loss']:.4f}  lr {logs.get('learning_rate', 0.0):.2e}  "
        f"{logs.get('tokens_per_second', 0.0):,.0f} tokens/s  "
        f"{logs.get('supervised_share', 0.0):.1%} supervised"
    )


class MetricsFile(TrainerCallback):
    """Appends every log entry to ``metrics.jsonl``, one JSON object a line (first rank only)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start a new file; a run that goes on keeps what was logged up to its checkpoint."""
        if state.is_world_process_zero:
            kept = [line for step, line in self._entries() if step <= state.global_step > 0]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def _entries(self) -> Iterator[tuple[int, str]]:
        """Step and text of every whole line; a killed run may have left half of one."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for line in lines:
            try:
                yield json.loads(line)["step"], line
            except ValueError:
                continue

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the entry."""
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
