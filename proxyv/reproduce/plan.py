"""Presets of the reproduction: YAML files under ``configs/reproduce`` that list the arms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from proxyv.cli import CommandError, nearest
from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.eval.controls import check_control
from proxyv.reduction import build_reduction
from proxyv.train.config_files import load_settings, read_chain
from proxyv.train.settings import Settings

__all__ = [
    "ROOT",
    "RULES",
    "STAGES",
    "TIERS",
    "Arm",
    "Claim",
    "Job",
    "Plan",
    "choose",
    "find_plan",
    "presets",
    "read_plan",
]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "reproduce"
STAGES = ("pretrain", "finetune")
RULES = ("better", "worse", "not worse")
TIERS = {1: "tier 1", 2: "tier 2", 3: "ablations"}


@dataclass(frozen=True)
class Arm:
    """One row of the tables.

    Attributes:
        name: of its files.
        title: in tables.
        tier: a key of `TIERS`.
        model: settings of the section ``model`` in which it differs.
        finetune: settings of stage 2 in which it differs, by section.
        pretrained: arm whose stage 1 it goes on from; None trains its own.
        checkpoint: arm whose finished model it evaluates; None trains its own.
        reduction: token-reduction method for that evaluation; None for none.
        control: what that evaluation puts in place of the images; None for nothing.
        paper: the row of the paper's tables that it stands beside, see ``paper.py``.
        against: arm that it is a variant of, and is compared with besides the baseline.
        seeds: that it is run with; None for those of its tier.
    """

    name: str
    title: str
    tier: int
    model: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    checkpoint: str | None = None
    reduction: Mapping[str, Any] | None = None
    control: str | None = None
    paper: str | None = None
    against: str | None = None
    seeds: Sequence[int] | None = None

    def settings(self) -> dict[str, Any]:
        """What makes its result what it is, besides what all arms have; for its result file."""
        return {
            "model": dict(self.model),
            "finetune": {section: dict(own) for section, own in self.finetune.items()},
            "pretrained": self.pretrained,
            "reduction": None if self.reduction is None else dict(self.reduction),
            "control": self.control,
        }


@dataclass(frozen=True)
class Job:
    """An arm with a seed; ``name`` is that of its result file."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Such as ``proxyv-early-seed1``."""
        return f"{self.arm.name}-seed{self.seed}"


@dataclass(frozen=True)
class Claim:
    """A statement about two arms.

    Attributes:
        text: the statement.
        paper: the paper's numbers for it.
        arm: the arm that it is about.
        other: the arm that it is compared with.
        rule: one of `RULES`: better than the other, worse, or not worse by more than a margin.
        task: the benchmark; None for the mean of the preset's score.
    """

    text: str
    paper: str
    arm: str
    other: str
    rule: str
    task: str | None = None


@dataclass(frozen=True)
class Plan:
    """A preset.

    Attributes:
        name: of its folders.
        title: in the report.
        pretrain: settings file of stage 1.
        finetune: settings file of stage 2.
        world: arguments of ``proxyv.synthetic.world.write_world``.
        tasks: rows asked of each benchmark, from the first on.
        score: benchmarks whose scores are averaged.
        seeds: of training.
        arms: by name.
        measures: what counts of some tasks in place of the benchmark's main score.
        notes: for the report, on how far the preset can speak to the paper.
        claims: of the preset's own, besides the paper's.
        went_wrong: for the report, what failed on the way and what was done about it.
        settings: training settings of all arms, by section.
        pretrain_settings: those of stage 1 alone.
        later_seeds: those that tiers 2 and 3, and controls, take; None for the first.
        batch_size: questions at a time.
        answer_tokens: longest answer of some tasks; the others are as long as published.
        cost: ``crops``, ``text`` and ``repeats`` of the prefill and the step that are timed.
        curve: shares of layers of the redundancy curve; None leaves it out.
    """

    name: str
    title: str
    pretrain: str
    finetune: str
    world: Mapping[str, Any]
    tasks: Mapping[str, int]
    score: Sequence[str]
    seeds: Sequence[int]
    arms: Mapping[str, Arm]
    measures: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    claims: Sequence[Claim] = ()
    went_wrong: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    pretrain_settings: Mapping[str, Any] = field(default_factory=dict)
    later_seeds: Sequence[int] | None = None
    batch_size: int = 16
    answer_tokens: Mapping[str, int] = field(default_factory=dict)
    cost: Mapping[str, int] = field(default_factory=lambda: {"crops": 5, "text": 50, "repeats": 7})
    curve: str | None = None

    def jobs(self) -> list[Job]:
        """Every arm with its seeds: a whole seed of tier 1 first, the later tiers last."""
        return [
            Job(arm, seed)
            for tier in TIERS
            for seed in self.seeds
            for arm in self.arms.values()
            if arm.tier == tier and seed in self.seeds_of(arm)
        ]

    def seeds_of(self, arm: Arm) -> Sequence[int]:
        """The arm's own, else those of its tier: all of them for tier 1.

        A control tells of the questions and not of an arm, so it takes those of later tiers.
        """
        if arm.seeds is not None:
            return arm.seeds
        if arm.tier == 1 and arm.control is None:
            return self.seeds
        return self.seeds[:1] if self.later_seeds is None else self.later_seeds

    def measure(self, task: str) -> str:
        """The score of a task that counts."""
        return self.measures.get(task) or BENCHMARKS[task].main_score

    def trained(self, job: Job) -> Job:
        """The job whose finished model a job evaluates; itself where it trains."""
        return job if job.arm.checkpoint is None else Job(self.arms[job.arm.checkpoint], job.seed)

    def trainer(self, job: Job, stage: str) -> Job:
        """The job that trains a stage of a job that trains: another one where stage 1 is shared."""
        shared = job.arm.pretrained if stage == "pretrain" else None
        return job if shared is None else Job(self.arms[shared], job.seed)

    def stage(self, job: Job, stage: str, runs: Path) -> Settings:
        """Settings of a stage of training.

        Args:
            job: an arm that trains this stage, see `trainer`.
            stage: "pretrain" or "finetune".
            runs: folder of the preset's runs.
        """
        world, folder = runs / "world", runs / job.name
        rows = {
            "pretrain": world / "sharegpt4v" / "captions.json",
            "finetune": world / "llava_next" / "conversations.json",
        }
        own = {
            "data.annotations": str(rows[stage]),
            "data.images": str(world),
            "run.output_dir": str(folder / stage),
            "run.seed": job.seed,
            **_flat({"model": job.arm.model}),
        }
        if stage == "finetune":
            own["model.init_from"] = str(runs / self.trainer(job, "pretrain").name / "pretrain")
        more = self.pretrain_settings if stage == "pretrain" else job.arm.finetune
        values = {**_flat(self.settings), **_flat(more), **own}
        path = ROOT / getattr(self, stage)
        return load_settings(path, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``section.name`` of every setting."""
    return {f"{s}.{name}": value for s, part in sections.items() for name, value in part.items()}


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "arms")


def find_plan(name: str) -> Plan:
    """Read a preset by its name, or a YAML file of one's own.

    Raises:
        CommandError: no such preset.
        ValueError: see `read_plan`.
    """
    if name.endswith(".yaml"):
        return read_plan(Path(name))
    if name not in presets():
        raise CommandError(nearest("preset", name, presets()))
    return read_plan(FOLDER / f"{name}.yaml")


def read_plan(path: Path) -> Plan:
    """Read a YAML file and what it builds on; ``${names.x}`` stands for a value under ``names:``.

    Raises:
        ValueError: an unknown or missing key, an arm whose checkpoint is no trained arm, or a
            benchmark or a reduction method that does not exist.
    """
    merged = OmegaConf.merge(*(OmegaConf.create(content) for _, content in read_chain(path)))
    content = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    arms = {
        name: Arm(**_checked(f"{path}: arm {name}", Arm, {"name": name, **own}))
        for name, own in content.pop("arms", {}).items()
    }
    claims = [
        Claim(**_checked(f"{path}: claim {number}", Claim, own))
        for number, own in enumerate(content.pop("claims", []), 1)
    ]
    content.pop("names", None)
    plan = Plan(**_checked(str(path), Plan, {"arms": arms, "claims": claims, **content}))
    _check(path, plan)
    return plan


def _checked(where: str, kind: type, values: dict[str, Any]) -> dict[str, Any]:
    known = {item.name: item for item in fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {nearest('key', key, known)}")
    for key, item in known.items():
        optional = item.default is not MISSING or item.default_factory is not MISSING
        if key not in values and not optional:
            raise ValueError(f"{where} has no {key!r}, which is needed")
    return values


def _check(path: Path, plan: Plan) -> None:
    for task in [*plan.tasks, *plan.score, *plan.answer_tokens, *plan.measures]:
        if task not in BENCHMARKS:
            raise ValueError(f"{path}: {nearest('task', task, BENCHMARKS)}")
    if missing := [task for task in plan.score if task not in plan.tasks]:
        raise ValueError(f"{path}: score names {missing}, which tasks does not ask")
    for task in plan.tasks:
        if not BENCHMARKS[task].is_share:
            raise ValueError(
                f"{path}: tasks names {task}, whose {BENCHMARKS[task].main_score} is no share "
                "between 0 and 1; scores are averaged and reported as percent of 1, so take it out"
            )
    if idle := [task for task in plan.measures if task not in plan.tasks]:
        raise ValueError(f"{path}: measures names {idle}, which tasks does not ask")
    if plan.curve is not None and (twice := [t for t in plan.score if t in plan.measures]):
        raise ValueError(
            f"{path}: measures names {twice}, whose main scores make the redundancy curve: take "
            "them out of measures or of score, or the curve out"
        )
    if plan.curve is not None and len({plan.tasks[task] for task in plan.score}) > 1:
        raise ValueError(
            f"{path}: the redundancy curve asks equally many rows of all tasks of score, and tasks "
            f"asks {[plan.tasks[task] for task in plan.score]} of {[*plan.score]}: make these "
            "numbers equal, or take the curve out"
        )
    for claim in plan.claims:
        for name in (claim.arm, claim.other):
            if name not in plan.arms:
                raise ValueError(f"{path}: claim {claim.text!r}: {nearest('arm', name, plan.arms)}")
        if claim.rule not in RULES:
            raise ValueError(f"{path}: claim {claim.text!r}: {nearest('rule', claim.rule, RULES)}")
        if claim.task is not None and claim.task not in plan.tasks:
            raise ValueError(
                f"{path}: claim {claim.text!r}: {nearest('task', claim.task, plan.tasks)}"
            )
    named = {"later_seeds": plan.later_seeds} | {
        f"arm {a.name}": a.seeds for a in plan.arms.values()
    }
    for where, seeds in named.items():
        if seeds is not None and not isinstance(seeds, list):
            raise ValueError(f"{path}: {where} has seeds {seeds!r}; write a list, such as [1]")
        if unknown := [seed for seed in seeds or () if seed not in plan.seeds]:
            raise ValueError(f"{path}: {where} has seeds {unknown}, of {[*plan.seeds]}")
    for arm in plan.arms.values():
        try:
            _check_arm(plan, arm)
        except ValueError as error:
            raise ValueError(f"{path}: arm {arm.name}: {error}") from error


def _check_arm(plan: Plan, arm: Arm) -> None:
    for section, own in arm.finetune.items():
        if not isinstance(own, Mapping):
            raise ValueError(
                f"finetune has {section}: {own!r}; write it by section, such as "
                "{optim: {epochs: 2.0}}"
            )
    if arm.tier not in TIERS:
        raise ValueError(f"tier {arm.tier!r}, one of {[*TIERS]}")
    if arm.against is not None and arm.against not in plan.arms:
        raise ValueError(f"against: {nearest('arm', arm.against, plan.arms)}")
    if arm.reduction is not None:
        build_reduction(arm.reduction)
    check_control(arm.control)
    if arm.checkpoint is None and arm.reduction is not None:
        raise ValueError(
            "a reduction and no checkpoint: give the arm whose model it is used on, or train with "
            "it as model.reduction"
        )
    if arm.checkpoint is None and arm.control is not None:
        raise ValueError("a control and no checkpoint: give the arm whose model is asked")
    begun = dict(arm.model)  # the settings of a stage 1 that it can go on from
    trained_with = begun.get("reduction")
    if trained_with and not build_reduction(trained_with).weights:
        del begun["reduction"]
    if arm.pretrained is not None:
        first = plan.arms.get(arm.pretrained)
        if first is None:
            raise ValueError(nearest("arm", arm.pretrained, plan.arms))
        if first.checkpoint or first.pretrained or first.model not in (arm.model, begun):
            raise ValueError(
                f"it goes on from stage 1 of {first.name}, which must train it itself, with the "
                "same model settings, or all of them but for a token reduction without weights"
            )
    for name in filter(None, (arm.checkpoint, arm.pretrained)):
        known = plan.seeds_of(plan.arms[name]) if name in plan.arms else plan.seeds
        if lacking := [seed for seed in plan.seeds_of(arm) if seed not in known]:
            raise ValueError(
                f"it needs {name} with seeds {lacking}, which the preset does not run: give it "
                f"seeds of {[*known]}"
            )
    if arm.checkpoint is not None:
        source = plan.arms.get(arm.checkpoint)
        if source is None:
            raise ValueError(nearest("arm", arm.checkpoint, plan.arms))
        if source.checkpoint is not None or arm.model or arm.finetune or arm.pretrained:
            raise ValueError(
                f"it evaluates {source.name}, so it has no settings of training, and that arm "
                "must train"
            )


def choose(
    plan: Plan, tiers: Iterable[int], arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Job]:
    """The jobs of some tiers, or of some arms whatever their tier, with some of their seeds.

    Raises:
        CommandError: a tier, an arm or a seed that the plan does not have, or an arm that it has
            with none of the seeds.
    """
    wanted = set(tiers)
    if unknown := wanted - TIERS.keys():
        raise CommandError(f"--tiers {min(unknown)}: there are {', '.join(map(str, TIERS))}")
    for seed in seeds or ():
        if seed not in plan.seeds:
            raise CommandError(f"seed {seed}: the preset has {', '.join(map(str, plan.seeds))}")
    for name in arms or ():
        if name not in plan.arms:
            raise CommandError(nearest("arm", name, plan.arms))
        own = plan.seeds_of(plan.arms[name])
        if seeds and not set(seeds) & set(own):
            said = ", ".join(map(str, own))
            raise CommandError(f"--seeds: the preset runs {name} with {said}: name one of them too")
    return [
        job
        for job in plan.jobs()
        if (job.arm.name in arms if arms else job.arm.tier in wanted)
        and (not seeds or job.seed in seeds)
    ]
