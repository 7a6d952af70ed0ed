"""The paper's tables in miniature: ``python -m proxyv.reproduce run``, ``status``, ``report``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from proxyv.cli import CommandError, message_console, run_command, table_console
from proxyv.reproduce.plan import ROOT, TIERS, Job, Plan, choose, find_plan, presets
from proxyv.reproduce.progress import Progress, job_states, state_table

__all__ = ["main"]

RESULTS = Path("docs", "results", "reproduction")
RUNS = Path("runs", "reproduce")
_DYING_SECONDS = 10.0  # workers of a run that was killed hold its folder a little longer


def build_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.reproduce",
        description="Train and evaluate every arm of the paper's tables at small scale.",
        epilog="""examples, from the folder of the repository:
  python -m proxyv.reproduce run --preset tiny                  tier 1, every seed
  python -m proxyv.reproduce run --preset tiny --arms fastv     one arm
  python -m proxyv.reproduce status --preset tiny --tiers 1,2,3
  python -m proxyv.reproduce report                             from the result files alone""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="do what is left; runs started beside each other share it"
    )
    status = commands.add_parser("status", help="what is done, what is left, and how long it takes")
    report = commands.add_parser("report", help="write the report from the result files")
    for sub in (run, status):
        sub.add_argument("--preset", default="tiny", help=f"{', '.join(presets())}, or a YAML file")
        sub.add_argument("--tiers", default="1", help=f"of {_tiers()} (default: 1)")
        sub.add_argument("--arms", help="these arms instead, names with commas between")
        sub.add_argument("--seeds", help="only these seeds, with commas between")
        sub.add_argument("--runs", type=Path, default=RUNS, help=f"training (default: {RUNS})")
    status.add_argument("--json", action="store_true", help="print JSON instead of the table")
    report.add_argument("--presets", default=",".join(presets()), help="names, or YAML files")
    for sub in (run, status, report):
        sub.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    report.add_argument(
        "--output", type=Path, help="the report (default: reproduction.md beside the results)"
    )
    return parser


def _tiers() -> str:
    return ", ".join(f"{number} ({name})" for number, name in TIERS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where an arm failed, 128 + signal where one was told to stop."""
    args = build_parser().parse_args(argv)
    if not args.results.is_absolute() and Path.cwd().resolve() != ROOT:
        raise CommandError(
            f"--results {args.results} is a folder of the repository, as the presets' files are: "
            f"cd {ROOT} first"
        )
    if args.command == "report":
        from proxyv.reproduce.report import write_report

        if not args.results.is_dir():
            raise CommandError(f"--results {args.results}: there is no such folder")
        plans = [find_plan(name) for name in _words(args.presets)]
        output = args.output or args.results.parent / "reproduction.md"
        write_report(plans, args.results, output)
        print(f"written: {output}")
        return 0
    plan = find_plan(args.preset)
    jobs = choose(plan, _numbers("tiers", args.tiers), _words(args.arms), _seeds(args.seeds))
    if not jobs:
        raise CommandError(
            f"--tiers {args.tiers!r}: no arm of the preset {plan.name} with these seeds; there are "
            f"tiers {_tiers()}"
        )
    runs, results = args.runs / plan.name, args.results / plan.name
    states = job_states(plan, jobs, results, runs)  # refuses what was made with another preset
    if args.command == "status":
        if args.json:
            print(json.dumps([state.as_dict() for state in states], indent=1))
        else:
            table_console().print(state_table(plan, states))
        return 0
    return _run(plan, jobs, runs, results)


def _run(plan: Plan, jobs: Sequence[Job], runs: Path, results: Path) -> int:
    """Do every job that is not done; one that fails is recorded, and the next goes on.

    Runs beside this one take other jobs: each holds the folder of the model that it works on.
    """
    from proxyv.files import write_json
    from proxyv.reproduce.results import FAILED, read_result, result_file, seed_dtype
    from proxyv.reproduce.work import failure, make_world, now, run_curve, run_job
    from proxyv.train.lock import Busy, only_run
    from proxyv.train.signals import Interrupted

    console = message_console()
    progress = Progress(plan, jobs, results, console.print)
    began = now()
    with only_run(runs, wait_seconds=math.inf):  # one draws the world, the others find it
        world = make_world(plan, runs)

    def work(job: Job) -> None:
        found = read_result(plan, job, results)
        if found is not None and (found.done or found.content["date"] >= began):
            progress.skip(job, found.content["status"])
            return
        progress.begin(job)
        try:
            dtype = seed_dtype(results, job.seed)
            content = run_job(plan, job, runs, world, console.print, dtype)
        except Interrupted:
            raise
        except Exception as error:  # whatever an arm fails of, the others are worth running
            content = failure(plan, job, error)
        write_json(result_file(results, job), content)
        progress.end(job, content)

    left, patience = list(jobs), 0.0
    try:
        while left:
            tried, left = left, []
            for job in tried:
                try:
                    with only_run(runs / plan.trained(job).name, wait_seconds=patience):
                        work(job)
                except Busy:
                    left.append(job)
            if len(left) == len(tried) and patience:
                break  # all of it is in other hands
            patience = _DYING_SECONDS if len(left) == len(tried) else 0.0
    except Interrupted as stopped:
        console.print(str(stopped))
        return 128 + stopped.number
    if left:
        console.print(f"left to other runs: {', '.join(job.name for job in left)}")
    else:
        try:
            with only_run(runs / "redundancy", wait_seconds=_DYING_SECONDS):
                run_curve(plan, runs, results, console.print)
        except Busy:
            console.print("left to another run: the redundancy curve")
    failed = [job.name for job in jobs if (r := read_result(plan, job, results)) and not r.done]
    if failed:
        console.print(f"error: {len(failed)} arms {FAILED}: {', '.join(failed)}")
    return 1 if failed else 0


def _words(given: str | None) -> list[str]:
    return [word.strip() for word in (given or "").split(",") if word.strip()]


def _numbers(option: str, given: str) -> list[int]:
    words = _words(given)
    if not all(word.isdigit() for word in words):
        raise CommandError(f"--{option} {given!r}: write whole numbers with commas between")
    return [int(word) for word in words]


def _seeds(given: str | None) -> list[int]:
    return _numbers("seeds", given) if given else []


if __name__ == "__main__":
    sys.exit(run_command(main))
