"""How far a reproduction is: states of the jobs, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table

from proxyv.reproduce.plan import STAGES, TIERS, Job, Plan
from proxyv.reproduce.results import Result, read_result

__all__ = ["JobState", "Progress", "duration", "job_states", "left_seconds", "state_table"]


@dataclass(frozen=True)
class JobState:
    """What is known of a job.

    Attributes:
        name: of the job.
        tier: of its arm.
        trains: whether it trains a model of its own.
        state: "done", "failed", "begun" or "not run".
        seconds: that it took, without sessions that were killed; None where it is not done.
        error: why it failed, empty else.
    """

    name: str
    tier: int
    trains: bool
    state: str
    seconds: float | None
    error: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def job_states(plan: Plan, jobs: Sequence[Job], results: Path, runs: Path) -> list[JobState]:
    """The states of some jobs, from result files and folders of runs.

    Raises:
        CommandError: see `proxyv.reproduce.results.read_result`.
    """
    return [_state(job, read_result(plan, job, results), runs) for job in jobs]


def _state(job: Job, result: Result | None, runs: Path) -> JobState:
    state, seconds, error = "not run", None, ""
    if result is not None and result.done:
        state, seconds = "done", spent(result.content)
    elif result is not None:
        state, error = "failed", result.content["error"]
    elif (runs / job.name).is_dir():
        state = "begun"
    return JobState(job.name, job.arm.tier, job.arm.checkpoint is None, state, seconds, error)


def spent(content: Mapping[str, Any]) -> float:
    """Seconds of training, without what another arm trained, and of evaluation."""
    stages: tuple[str, ...] = ()
    if content["training"]["of"] == f"{content['arm']}-seed{content['seed']}":
        shared = content["settings"]["arm"]["pretrained"] is not None
        stages = STAGES[1:] if shared else STAGES
    training = sum(content["training"][stage]["seconds"] for stage in stages)
    return training + sum(task["seconds"] for task in content["tasks"].values())


def left_seconds(states: Sequence[JobState]) -> float | None:
    """How long the rest takes, from what is done; None where nothing like it is."""
    total = 0.0
    for trains in (True, False):
        alike = [state for state in states if state.trains == trains]
        known = [state.seconds for state in alike if state.seconds is not None]
        left = sum(state.seconds is None for state in alike)
        if left and not known:
            return None
        total += left * mean(known) if left else 0.0
    return total


def duration(seconds: float | None) -> str:
    """Hours and minutes, or a question mark."""
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def state_table(plan: Plan, states: Sequence[JobState]) -> Table:
    """The states, with what is left."""
    left = duration(left_seconds(states))
    done = sum(state.state == "done" for state in states)
    table = Table(
        title=f"{plan.name}: {done} of {len(states)} done, about {left} left",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for column in ("arm", "tier", "state", "time, at least"):
        table.add_column(column)
    for state in states:
        took = duration(state.seconds) if state.seconds is not None else ""
        what = f"{state.state}: {state.error}" if state.error else state.state
        table.add_row(state.name, TIERS[state.tier], what, took)
    return table


class Progress:
    """Lines about where a run is.

    Args:
        plan: the preset.
        jobs: all of them.
        results: folder of result files.
        say: takes lines for the user.
    """

    def __init__(
        self, plan: Plan, jobs: Sequence[Job], results: Path, say: Callable[[str], None]
    ) -> None:
        self._plan, self._jobs, self._results, self._say = plan, list(jobs), results, say
        self._begun = 0.0

    def _line(self, job: Job, text: str) -> None:
        place = self._jobs.index(job) + 1
        self._say(f"[{place}/{len(self._jobs)}] {job.name}: {text}")

    def skip(self, job: Job, status: str) -> None:
        """A job that is done already, or that failed while this run was going on."""
        self._line(job, f"already {status}")

    def begin(self, job: Job) -> None:
        """A job that starts, or goes on."""
        self._begun = time.monotonic()
        self._line(job, "begins")

    def end(self, job: Job, content: Mapping[str, Any]) -> None:
        """A job that ended, and how long the rest will take."""
        took = duration(time.monotonic() - self._begun)
        left = duration(left_seconds(job_states(self._plan, self._jobs, self._results, Path())))
        what = content["status"] + (f" ({content['error']})" if "error" in content else "")
        self._line(job, f"{what} after {took}; about {left} left")
