"""The report: all results come from result files; the same files give the same bytes."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from proxyv.cli import CommandError
from proxyv.eval.compare import LOWER_IS_BETTER
from proxyv.provenance import short_commit
from proxyv.reproduce.claims import (
    BLIND_SHARE,
    CLAIMS,
    MARGIN,
    Gap,
    Table,
    blind_share,
    find_gap,
    mean_interval,
    verdict,
)
from proxyv.reproduce.figures import Point, Share, draw_curve, draw_scores
from proxyv.reproduce.paper import LLMS, MASKED, ROWS
from proxyv.reproduce.plan import STAGES, TIERS, Arm, Claim, Plan
from proxyv.reproduce.results import CURVE, Result, read_results

__all__ = ["WANTED", "write_report"]

WANTED = (55.0, 90.0)
"""Between these percents the baseline of a task is neither at its floor nor at its ceiling."""

NONE, ONE_SEED = "–", " (one seed)"


def write_report(plans: Sequence[Plan], results: Path, output: Path) -> None:
    """Write the report and its figures.

    Args:
        plans: the presets, in their order.
        results: folder with a folder of result files for each preset.
        output: the Markdown file; figures go beside it, ``<name>-<preset>-scores.png``.

    Raises:
        CommandError: a result file is damaged, or was not made as its preset says now.
    """
    sections = [_section(plan, results / plan.name, output) for plan in plans]
    sections.sort(key=lambda section: not section["any"])  # what has been run comes first
    text = files("proxyv.reproduce").joinpath("report.md.j2").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    page = environment.from_string(text).render(
        sections=sections,
        margin=MARGIN,
        blind_share=BLIND_SHARE,
        wanted=WANTED,
        llms=LLMS,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def _section(plan: Plan, folder: Path, output: Path) -> dict[str, Any]:
    """What the template needs of a preset."""
    found = read_results(plan, folder)
    table = {(result.arm, result.seed): result for result in found if result.done}
    failed = {(result.arm, result.seed): result for result in found if not result.done}
    jobs = plan.jobs()
    verdicts = [_verdict_row(plan, table, claim) for claim in (*CLAIMS, *plan.claims)]
    return {
        "plan": plan,
        "measures": [f"{task}: {_measure_text(plan, task)}" for task in plan.tasks],
        "any": bool(table),
        "verdicts": verdicts,
        "count": _count(verdicts),
        "paper_count": _count([row for row in verdicts if row["paper"] != NONE]),
        "tier_one": _tier_one(plan, table),
        "rows": [row for arm in _by_tier(plan) if (row := _arm_row(plan, table, arm))],
        "variants": [row for arm in _by_tier(plan) if (row := _variant_row(plan, table, arm))],
        "tasks": _task_rows(plan, table),
        "floor": _out_of_range(plan, table),
        "blind": _answered_blind(plan, table),
        "control": blind_share(plan, table, list(plan.tasks)) is not None,
        "figure": _scores_figure(plan, table, output),
        "curve": _curve(plan, table, folder, output),
        "files": [_file_row(plan, result) for result in found if result.done],
        "failed": [
            (job.name, failed[job.arm.name, job.seed].content["error"])
            for job in jobs
            if (job.arm.name, job.seed) in failed
        ],
        "missing": {
            name: [
                job.name
                for job in jobs
                if job.arm.tier == tier
                and (job.arm.name, job.seed) not in table.keys() | failed.keys()
            ]
            for tier, name in TIERS.items()
        },
    }


def _by_tier(plan: Plan) -> list[Arm]:
    return sorted(plan.arms.values(), key=lambda arm: arm.tier)


def _tier_one(plan: Plan, table: Table) -> str:
    """How much of tier 1 there is, such as "6 of 18"."""
    jobs = [job for job in plan.jobs() if job.arm.tier == 1]
    return f"{sum((job.arm.name, job.seed) in table for job in jobs)} of {len(jobs)}"


def _measure_text(plan: Plan, task: str) -> str:
    name = plan.measure(task)
    return f"1 - {name}" if name in LOWER_IS_BETTER else name


def _of(plan: Plan, table: Table, arm: str) -> list[Result]:
    """The finished results of an arm, one for each seed."""
    return [table[arm, seed] for seed in plan.seeds if (arm, seed) in table]


def _verdict_row(plan: Plan, table: Table, claim: Claim) -> dict[str, Any]:
    gap = find_gap(plan, table, claim)
    blind = blind_share(plan, table, [claim.task] if claim.task else plan.score)
    return {
        "text": claim.text,
        "paper": claim.paper,
        **_gap_cells(gap),
        "verdict": verdict(claim.rule, gap, blind) + _one_seed(gap),
    }


def _count(verdicts: Sequence[Mapping[str, Any]]) -> Counter[str]:
    return Counter(row["verdict"].removesuffix(ONE_SEED) for row in verdicts)


def _one_seed(gap: Gap | str) -> str:
    return ONE_SEED if isinstance(gap, Gap) and len(gap.seeds) == 1 else ""


def _gap_cells(gap: Gap | str) -> dict[str, str]:
    """A gap with its interval, those of its seeds, and its p; or why there is none."""
    if isinstance(gap, str):
        return {"gap": gap, "seeds": NONE, "p": NONE}
    return {"gap": _gap_text(gap), "seeds": _seed_gaps(gap), "p": _p_text(gap.p_value)}


def _p_text(value: float) -> str:
    """A p-value; 0.0001 is the least that ten thousand permutations can show."""
    return "≤ 0.0001" if value < 0.00015 else f"{value:.4f}"


def _gap_text(gap: Gap) -> str:
    low, high = gap.interval
    return f"{gap.value:+.2f} ({low:+.2f} to {high:+.2f})"


def _seed_gaps(gap: Gap) -> str:
    return ", ".join(f"{seed}: {value:+.2f}" for seed, value in gap.seeds.items())


def _arm_row(plan: Plan, table: Table, arm: Arm) -> dict[str, Any] | None:
    """A row of the main table; None for an arm without a result."""
    results = _of(plan, table, arm.name)
    if not results:
        return None
    value, low, high = mean_interval(results, plan.score)
    gap = find_gap(plan, table, Claim("", "", arm.name, "baseline", "better"))
    alike = not arm.finetune  # trained for as long as the baseline
    compared = alike and arm.name != "baseline"
    paper = ROWS.get(arm.paper) if arm.paper else None
    return {
        "title": arm.title,
        "is_control": arm.control is not None,
        "tier": TIERS[arm.tier],
        "seeds": str(len(results)),
        "score": f"{value:.2f} ({low:.2f} to {high:.2f})",
        "gap": _gap_text(gap) if compared and isinstance(gap, Gap) else NONE,
        "relative": _relative(plan, table, arm) if alike else NONE,
        "flops": _percent(_flops_saved(results)),
        "as_run": _percent(_flops_saved(results, "as_run")),
        "time": _time_saved(results, "prefill"),
        "training": _training_saved(arm, results),
        "paper_relative": f"{paper.relative:.1f}" if paper else NONE,
        "paper_flops": str(paper.flops) if paper and paper.flops is not None else NONE,
        "paper_time": str(paper.time) if paper and paper.time is not None else NONE,
    }


def _variant_row(plan: Plan, table: Table, arm: Arm) -> dict[str, str] | None:
    """An arm beside the one that it is a variant of; None where it is none, or has no result."""
    results = _of(plan, table, arm.name)
    if arm.against is None or not results:
        return None
    gap = find_gap(plan, table, Claim("", "", arm.name, arm.against, "better"))
    others = _of(plan, table, arm.against)
    return {
        "title": arm.title,
        "other": plan.arms[arm.against].title,
        **_gap_cells(gap),
        "flops": _percent(_flops_saved(results)),
        "other_flops": _percent(_flops_saved(others)) if others else NONE,
    }


def _relative(plan: Plan, table: Table, arm: Arm) -> str:
    """Percent of the baseline's score, over the seeds that both have."""
    both = [s for s in plan.seeds if (arm.name, s) in table and ("baseline", s) in table]
    if not both:
        return NONE
    own, base = (
        mean_interval([table[name, s] for s in both], plan.score)[0]
        for name in (arm.name, "baseline")
    )
    return NONE if base == 0 else f"{100 * own / base:.1f}"


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _flops_saved(results: Sequence[Result], count: str = "paper") -> float:
    """Percent of the baseline's FLOPs."""
    cost = results[0].content["cost"]
    return 100 * (1 - cost["flops"][count] / cost["baseline_flops"][count])


def _training_saved(arm: Arm, results: Sequence[Result]) -> str:
    return "not trained" if arm.checkpoint is not None else _time_saved(results, "step")


def _time_saved(results: Sequence[Result], what: str) -> str:
    """Percent of the baseline's time: median, least and most over the rounds of all seeds."""
    saved = [
        100 * (1 - mine / theirs)
        for result in results
        for mine, theirs in zip(
            result.content["cost"][f"{what}_seconds"],
            result.content["cost"][f"baseline_{what}_seconds"],
            strict=True,
        )
    ]
    return f"{statistics.median(saved):.1f} ({min(saved):.0f} to {max(saved):.0f})"


def _task_rows(plan: Plan, table: Table) -> list[tuple[str, list[str]]]:
    """Score of every task, in percent, by arm."""
    rows = []
    for arm in _by_tier(plan):
        if results := _of(plan, table, arm.name):
            scores = _task_scores(plan, results)
            cells = [f"{scores[task]:.1f}" if task in scores else NONE for task in plan.tasks]
            rows.append((arm.title, cells))
    return rows


def _task_scores(plan: Plan, results: Sequence[Result]) -> dict[str, float]:
    """Score in percent of every task that all of these were asked: a preset may have gained one."""
    return {
        task: mean_interval(results, [task])[0]
        for task in plan.tasks
        if all(result.questions(task) is not None for result in results)
    }


def _out_of_range(plan: Plan, table: Table) -> list[str]:
    """Tasks on which the baseline is at its floor or ceiling."""
    results = _of(plan, table, "baseline")
    if not results:
        return []
    scores = _task_scores(plan, results)
    low, high = WANTED
    return [f"{task} {score:.1f} %" for task, score in scores.items() if not low <= score <= high]


def _answered_blind(plan: Plan, table: Table) -> list[str]:
    """Tasks whose scores say nothing about what a model sees."""
    shares = {task: blind_share(plan, table, [task]) for task in plan.tasks}
    return [
        f"{task} {100 * share:.0f} %"
        for task, share in shares.items()
        if share is not None and share > BLIND_SHARE
    ]


def _scores_figure(plan: Plan, table: Table, output: Path) -> str | None:
    """Draw figure 1; its name, None where there is nothing to draw.

    Baselines of other seeds score otherwise, so an arm's own mean would not stand beside that of
    all baselines: it is placed by its gap to those of its own seeds.
    """
    points = []
    for arm in plan.arms.values():
        if arm.tier == 3 or arm.control is not None:
            continue
        gap = find_gap(plan, table, Claim("", "", arm.name, "baseline", "better"))
        if isinstance(gap, Gap):
            base = mean_interval(_of(plan, table, "baseline"), plan.score)[0]
            score = [base + value for value in (gap.value, *gap.interval)]
            flops = 100 - _flops_saved(_of(plan, table, arm.name))
            points.append(Point(arm.title, arm.checkpoint is None, flops, *score))
    name = f"{output.stem}-{plan.name}-scores.png"
    if not points:
        (output.parent / name).unlink(missing_ok=True)
        return None
    draw_scores(output.parent / name, f"{plan.name}: score against FLOPs", points)
    return name


def _curve(plan: Plan, table: Table, folder: Path, output: Path) -> dict[str, Any] | None:
    """Draw figure 2 from the file of the study; None where it was not run."""
    path, name = folder / CURVE, f"{output.stem}-{plan.name}-curve.png"
    if not path.is_file():
        (output.parent / name).unlink(missing_ok=True)
        return None
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _check_curve(plan, table, path, found)
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    depth = max((round(row["layers"] / row["ratio"]) for row in rows if row["ratio"]), default=0)
    trained = _by_start(plan, table, depth)
    scale = next((row["of base %"] / row["score %"] for row in rows if row["of base %"]), 0.0)
    masked = [
        Share(row["ratio"], *(scale * row[key] for key in ("score %", "from", "to")))
        for row in rows
    ]
    lines = {
        "vision attention masked, nothing trained": masked,
        "ProxyV, trained (gap to the baseline)": list(trained.values()),
        "masked, the paper's Vicuna-7B": [Share(x, y, y, y) for x, y in MASKED.items()],
    }
    draw_curve(output.parent / name, f"{plan.name}: what vision tokens need", lines)
    cells = [
        (
            f"{row['ratio']:.3g}",
            f"{row['score %']:.2f} ({row['from']:.2f} to {row['to']:.2f})",
            _p_text(row["p"]),
            NONE if row["of base %"] is None else f"{row['of base %']:.1f}",
            f"{trained[row['layers']].score:.1f}" if row["layers"] in trained else NONE,
            f"{MASKED[row['ratio']]:.1f}" if row["ratio"] in MASKED else NONE,
        )
        for row in rows
    ]
    return {
        "figure": name,
        "rows": cells,
        "commit": short_commit(found["commit"]),
        "seed": plan.seeds[0],
        "file": f"{plan.name}/{CURVE}",
        "hardware": found["hardware"]["device"],
        "torch": found["versions"]["torch"],
        "command": f"bash scripts/reproduce.sh {plan.name} --arms baseline --seeds {plan.seeds[0]}",
    }


def _check_curve(plan: Plan, table: Table, path: Path, found: Mapping[str, Any]) -> None:
    """Hold that the curve is of the baseline that is here, asked as the preset says now."""
    asked, base = found["settings"], table.get(("baseline", plan.seeds[0]))
    world = dict(plan.world)
    pairs = {
        "weights": (found["weights"], base.content["weights"] if base else found["weights"]),
        "tasks": (asked["tasks"], ",".join(plan.score)),
        "shares": (asked["ratios"], plan.curve),
        "questions of a task": (asked["limit"], plan.tasks[plan.score[0]]),
        "world": (found.get("world", world), world),  # the first file does not say it
    }
    for what, (there, wanted) in pairs.items():
        if there != wanted:
            raise CommandError(
                f"{path}: {what}: {there} there, and {wanted} in the baseline's result or the "
                f"preset {plan.name}: move it and the folder redundancy of the runs away, and run "
                "the baseline's arm again, which draws it"
            )


def _by_start(plan: Plan, table: Table, depth: int) -> dict[int, Share]:
    """Arms that differ from the baseline by their start layer alone, by their ProxyV layers."""
    found = {}
    for arm in plan.arms.values():
        start = arm.model.get("start_layer")
        alone = arm.model.keys() == {"start_layer"} and not (arm.pretrained or arm.finetune)
        gap = find_gap(plan, table, Claim("", "", arm.name, "baseline", "better"))
        if alone and start is not None and isinstance(gap, Gap) and depth:
            seeds = [s for s in plan.seeds if (arm.name, s) in table and ("baseline", s) in table]
            base = mean_interval([table["baseline", s] for s in seeds], plan.score)[0]
            ends = [100 + 100 * value / base for value in (gap.value, *gap.interval) if base]
            if ends:
                found[depth - start] = Share((depth - start) / depth, *ends)
    return dict(sorted(found.items()))


def _file_row(plan: Plan, result: Result) -> dict[str, str]:
    """Where a number comes from, and how it is made again."""
    content, arm = result.content, plan.arms[result.arm]
    names = filter(None, (arm.checkpoint, arm.pretrained, arm.name))  # what it needs comes first
    again = f"--arms {','.join(names)} --seeds {result.seed}"
    return {
        "name": f"{plan.name}/{result.path.name}",
        "seed": str(result.seed),
        "trained": _commits(content["training"]),
        "commit": short_commit(content["commit"]),
        "dtype": result.dtype,
        "hardware": content["hardware"]["device"],
        "torch": content["versions"]["torch"],
        "command": f"bash scripts/reproduce.sh {plan.name} {again}",
    }


def _commits(training: Mapping[str, Any]) -> str:
    """Commits that trained both stages, the first one first."""
    found = [commit for stage in STAGES for commit in training[stage]["commits"]]
    return ", ".join(dict.fromkeys(map(short_commit, found))) or "unknown"
