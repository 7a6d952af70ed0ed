"""One arm with one seed: train both stages, evaluate, measure. What is there already is kept.

Everything runs in this process, so whatever ends it ends the arm too; the same command then goes
on from the trainer's last checkpoint and the evaluation's last answer.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from proxyv.eval.answerer import Answerer
from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.eval.runner import RunOptions
from proxyv.eval.sources import load_rows
from proxyv.eval.stored import load_run
from proxyv.eval.tasks import score_tasks
from proxyv.files import write_json
from proxyv.provenance import fingerprint, git_commit, hardware, versions
from proxyv.reproduce.cost import arm_cost, page_crops
from proxyv.reproduce.plan import STAGES, Arm, Job, Plan
from proxyv.reproduce.results import CURVE, DONE, FAILED, task_entry
from proxyv.study.__main__ import main as study
from proxyv.train.build import FINISHED, SETTINGS, resolve
from proxyv.train.config_files import load_settings
from proxyv.train.launch import prepare_rank
from proxyv.train.lock import only_run
from proxyv.train.run import identity, train
from proxyv.train.settings import Settings

__all__ = [
    "BriefAnswerer",
    "failure",
    "make_world",
    "now",
    "run_curve",
    "run_job",
    "stage_settings",
    "train_job",
]

WORLD = "world.json"
"""Written last into the folder of the small world: what it was drawn with."""

CLOCK = "sessions.json"
"""Sessions that worked in a folder: their commits and seconds, None of one that was killed."""

LONG_ANSWER, LONG_ANSWER_BATCH = 48, 16


class BriefAnswerer(Answerer):
    """A model whose answers end after so many tokens, however long a benchmark lets them be.

    An arm that has not learned to end its answers would otherwise repeat itself for minutes.
    """

    most_tokens: int | None = None

    @property
    def batch_tokens(self) -> int | None:
        """Input tokens that are worth reading together: more where answers are long.

        A step of decoding reads all weights, for one row or for many (docs/log.md).
        """
        limit = super().batch_tokens
        is_long = self.most_tokens is not None and self.most_tokens >= LONG_ANSWER
        return LONG_ANSWER_BATCH * limit if is_long and limit is not None else limit

    def describe(self) -> dict[str, Any]:
        """What the answers depend on besides the weights."""
        cap = {} if self.most_tokens is None else {"answer_tokens": self.most_tokens}
        return super().describe() | cap

    def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
        """Answer prepared questions."""
        return super().generate(prepared, min(max_new_tokens, self.most_tokens or max_new_tokens))


def now() -> str:
    """The time in UTC, such as 2026-11-21T18:10:17.250+00:00; later ones sort behind."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def make_world(plan: Plan, runs: Path) -> Path:
    """Draw the small world of a preset, unless it is there.

    Raises:
        ValueError: the folder holds a world that was drawn otherwise.
    """
    folder = runs / "world"
    wanted = dict(plan.world)
    stamp = folder / WORLD
    if stamp.is_file():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(
                f"{folder} was drawn with {found}, the preset says {wanted}: models and results of "
                f"both would be mixed; move all of {runs} and the result files away"
            )
        return folder
    from proxyv.synthetic.world import write_world  # fonts and matplotlib only where it is drawn

    write_world(folder, **wanted, all_benchmarks=True)
    write_json(stamp, wanted)
    return folder


def run_job(
    plan: Plan,
    job: Job,
    runs: Path,
    world: Path,
    say: Callable[[str], None],
    dtype: str | None = None,
) -> dict[str, Any]:
    """Do what is left of a job.

    Args:
        plan: the preset.
        job: the arm and its seed.
        runs: folder of the preset's runs.
        world: see `make_world`.
        say: takes lines for the user.
        dtype: see `stage_settings`.

    Returns:
        The content of its result file.

    Raises:
        ValueError: settings or data that cannot be used, or questions that could not be asked.
        OSError: files that are not there.
        Interrupted: SIGTERM; a checkpoint was saved.
    """
    started = time.monotonic()
    source = plan.trained(job)
    _warn_of_type(plan, source, runs, say, dtype)
    trained = {}
    for stage in STAGES:
        trainer = plan.trainer(source, stage)
        # Another run may be at the arm that this stage 1 is of: its folder is waited for.
        with nullcontext() if trainer is source else only_run(runs / trainer.name, math.inf):
            trained[stage] = train_job(plan, trainer, stage, runs, dtype)
    model = runs / source.name / "finetune"
    fields: dict[str, Any] = (
        {} if job.arm.reduction is None else {"reduction": dict(job.arm.reduction)}
    )
    answerer = BriefAnswerer.load(str(model), **fields)
    assert isinstance(answerer, BriefAnswerer), "load makes an object of the class it is called on"
    tasks = evaluate(plan, job.arm, answerer, model, world, runs / job.name / "eval", say)
    say(f"{job.name}: cost of a prefill and of a training step")
    benchmark = BENCHMARKS[plan.score[0]]
    crops = page_crops(answerer, benchmark, load_rows(benchmark, world), plan.cost["crops"])
    return {
        "preset": plan.name,
        "arm": job.arm.name,
        "seed": job.seed,
        "status": DONE,
        "tasks": tasks,
        "cost": arm_cost(
            answerer.model,
            crops,
            plan.cost,
            trained["finetune"][1].model.dtype if source is job else None,
        ),
        "training": {
            "of": source.name,
            **{name: summary for name, (summary, _) in trained.items()},
        },
        "settings": {
            "arm": job.arm.settings(),
            **{name: asdict(settings) for name, (_, settings) in trained.items()},
            "evaluation": answerer.describe()
            | {"batch_size": plan.batch_size, "answer_tokens": dict(plan.answer_tokens)},
            "world": dict(plan.world),
        },
        "weights": fingerprint(model),
        "commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(answerer.device),
        "seconds": round(time.monotonic() - started, 1),
        "date": now(),
    }


def _warn_of_type(
    plan: Plan, job: Job, runs: Path, say: Callable[[str], None], dtype: str | None
) -> None:
    """Say that a job has yet to be trained in a type that is slow here; see `stage_settings`."""
    stage = STAGES[-1]
    wanted, faster = (
        stage_settings(plan, job, stage, runs, each).model.dtype for each in (dtype, None)
    )
    if wanted != faster and not (runs / job.name / stage / FINISHED).is_file():
        say(
            f"{job.name}: trained in {wanted} as the other arms of seed {job.seed} are, though "
            f"this machine multiplies {faster} faster, perhaps many times"
        )


def failure(plan: Plan, job: Job, error: Exception) -> dict[str, Any]:
    """The content of the result file of a job that failed; it is tried again by the next run."""
    return {
        "preset": plan.name,
        "arm": job.arm.name,
        "seed": job.seed,
        "status": FAILED,
        "error": f"{type(error).__name__}: {' '.join(str(error).split())}",
        "commit": git_commit(),
        "date": now(),
    }


def run_curve(plan: Plan, runs: Path, results: Path, say: Callable[[str], None]) -> None:
    """The redundancy curve of the first seed's baseline, once that is there."""
    output, target = runs / "redundancy", results / CURVE
    model = runs / f"baseline-seed{plan.seeds[0]}" / "finetune"
    if plan.curve is None or target.is_file() or not (model / FINISHED).is_file():
        return
    say(f"redundancy curve of {model}")
    options = {
        "model": model,
        "data": runs / "world",
        "tasks": ",".join(plan.score),
        "ratios": plan.curve,
        "limit": plan.tasks[plan.score[0]],  # as many as of the others, or the preset is refused
        "batch-size": plan.batch_size,
        "output": output,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    study(["redundancy", *words])
    found = json.loads((output / "redundancy.json").read_text(encoding="utf-8"))
    write_json(target, {**found, "weights": fingerprint(model), "world": dict(plan.world)})


def stage_settings(
    plan: Plan, job: Job, stage: str, runs: Path, dtype: str | None = None
) -> Settings:
    """Settings of a stage, with what this machine decides.

    Args:
        plan: the preset.
        job: an arm that trains this stage.
        stage: "pretrain" or "finetune".
        runs: folder of the preset's runs.
        dtype: type to train in where the preset leaves it open; None for what is faster here.
    """
    settings = plan.stage(job, stage, runs)
    if dtype is not None and settings.model.dtype == "auto":
        settings = replace(settings, model=replace(settings.model, dtype=dtype))
    return resolve(settings)


def train_job(
    plan: Plan, job: Job, stage: str, runs: Path, dtype: str | None = None
) -> tuple[dict[str, Any], Settings]:
    """Train a stage, or go on with it, or take what is finished; arguments as `stage_settings`.

    Returns:
        The trainer's summary with ``sessions`` and ``commits`` of all of them, ``seconds`` of those
        that were not killed, and the settings.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    settings = stage_settings(plan, job, stage, runs, dtype)
    folder = Path(str(settings.run.output_dir))
    clock = folder / CLOCK
    if not (folder / FINISHED).is_file():
        prepare_rank(settings)
        try:
            with _session(clock):
                train(settings)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    found, wanted = (identity(s, 1) for s in (load_settings(folder / SETTINGS), settings))
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(
                f"{folder} was trained with {key}={found[key]}, the preset says {value}: delete "
                "that folder, or undo the change"
            )
    summary = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    sessions = _sessions(clock)
    return {
        **summary,
        "seconds": _seconds(clock),
        "sessions": len(sessions),
        "commits": list(dict.fromkeys(session["commit"] for session in sessions)),
    }, settings


def _sessions(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _seconds(path: Path) -> float:
    """Of all sessions that were not killed."""
    return round(sum(session["seconds"] or 0.0 for session in _sessions(path)), 1)


@contextmanager
def _session(clock: Path) -> Iterator[None]:
    """Add what is done here to a file of sessions, which a session that is killed is in too."""
    started, earlier = time.monotonic(), _sessions(clock)
    session: dict[str, Any] = {"commit": git_commit(), "seconds": None}
    clock.parent.mkdir(parents=True, exist_ok=True)
    write_json(clock, [*earlier, session])
    try:
        yield
    finally:
        session["seconds"] = round(time.monotonic() - started, 1)
        write_json(clock, [*earlier, session])


def evaluate(
    plan: Plan,
    arm: Arm,
    answerer: BriefAnswerer,
    model: Path,
    world: Path,
    output: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Ask what the folder does not hold yet; entries of the result file by task.

    Raises:
        ValueError: a question could not be asked.
    """
    tasks = {}
    for task, limit in plan.tasks.items():
        rows, folder = load_rows(BENCHMARKS[task], world), output / task
        options = RunOptions(plan.batch_size, limit, arm.control)
        answerer.most_tokens = plan.answer_tokens.get(task)
        with _session(folder / CLOCK):
            results = score_tasks(
                str(model), answerer, {task: rows}, options, folder, say, data=world
            )
        entry = results["tasks"][task]
        if entry["failed"]:
            raise ValueError(
                f"{task}: {entry['failed']} questions could not be asked, the first: "
                f"{entry['errors'][0]}"
            )
        tasks[task] = {
            **task_entry(task, load_run(folder).records[task], plan.measures.get(task)),
            "seconds": _seconds(folder / CLOCK),
        }
    return tasks
