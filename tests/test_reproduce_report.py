"""The reproduction's report from hand-made result files, its verdicts worked out by hand here."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from proxyv.cli import CommandError, run_command
from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.files import write_json
from proxyv.reproduce.__main__ import main
from proxyv.reproduce.claims import CLAIMS, Gap, blind_share, find_gap, seed_parts, verdict
from proxyv.reproduce.plan import ROOT, STAGES, Claim, Job, Plan, find_plan
from proxyv.reproduce.report import write_report
from proxyv.reproduce.results import (
    CURVE,
    Result,
    pack,
    read_results,
    result_file,
    seed_dtype,
    task_entry,
    unpack,
)
from proxyv.train.config_files import settings_yaml

find_plan = functools.cache(find_plan)  # reads the preset once for all result files
QUESTIONS = 400
TASKS = ("docvqa", "chartqa", "infovqa", "textvqa", "ocrbench", "refcoco_testA", "ccpdf")
MEASURES = {task: BENCHMARKS[task].main_score for task in TASKS} | {
    "refcoco_testA": "refcoco_Center_ACC",
    "ccpdf": "doc_edit_distance",
}


def answers(rate: float, stream: int, like: np.ndarray | None = None) -> np.ndarray:
    """0 or 1 for each question; nine of ten are those of ``like``, where given."""
    rng = np.random.default_rng(stream)
    drawn = (rng.random(QUESTIONS) < rate).astype(float)
    return drawn if like is None else np.where(rng.random(QUESTIONS) < 0.9, like, drawn)


def made_with(arm: str, seed: int) -> dict[str, Any]:
    """The settings that a result file of the preset tiny names, in a folder of its own."""
    plan, runs = find_plan("tiny"), Path("elsewhere/tiny")
    job = Job(plan.arms[arm], seed)
    stages = {
        stage: plan.stage(plan.trainer(plan.trained(job), stage), stage, runs) for stage in STAGES
    }
    return {
        "arm": job.arm.settings(),
        **{stage: yaml.safe_load(settings_yaml(own)) for stage, own in stages.items()},
        "evaluation": {"batch_size": 4, "answer_tokens": dict(plan.answer_tokens)},
        "world": dict(plan.world),
    }


def content(arm: str, seed: int, parts: dict[str, np.ndarray], **more: Any) -> dict[str, Any]:
    """A result file as an arm leaves it."""
    source = find_plan("tiny").arms[arm].checkpoint or arm
    trained = {"seconds": 60.0, "steps": 3, "sessions": 1, "commits": ["0123456789abcdef"]}
    return {
        "preset": "tiny",
        "arm": arm,
        "seed": seed,
        "status": "done",
        "tasks": {
            task: {
                "samples": QUESTIONS,
                "measure": MEASURES[task],
                "value": float(own.mean()),
                "questions": "same",
                "scores": {MEASURES[task]: pack(1 - own if task == "ccpdf" else own)},
                "seconds": 1.0,
            }
            for task, own in parts.items()
        },
        "cost": {
            "flops": {"paper": 58, "as_run": 60},
            "baseline_flops": {"paper": 100, "as_run": 90},
            "prefill_seconds": [0.6, 0.5, 0.9],
            "baseline_prefill_seconds": [1.0, 1.0, 1.0],
            "step_seconds": [0.8, 0.7, 0.9],
            "baseline_step_seconds": [1.0, 1.0, 1.0],
        },
        "training": {"of": f"{arm}-seed{seed}", "pretrain": trained, "finetune": trained},
        "settings": made_with(arm, seed),
        "weights": f"those of {source}, seed {seed}",
        "versions": {"torch": "2.13.0"},
        "hardware": {"device": "a processor"},
        "commit": "0123456789abcdef",
        "seconds": 120.0,
    } | more


@pytest.fixture
def plan() -> Plan:
    return find_plan("tiny")


def put(folder: Path, plan: Plan, found: dict[str, Any]) -> None:
    job = Job(plan.arms[found["arm"]], found["seed"])
    write_json(result_file(folder / plan.name, job), found)


def fill(folder: Path, plan: Plan, lift: float, seeds: tuple[int, ...] = (1, 2, 3)) -> dict:
    """Results of the baseline and of an arm that is better by about ``lift``; their parts."""
    parts: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for seed in seeds:
        base = {task: answers(0.6, 100 * seed + n) for n, task in enumerate(TASKS)}
        arm = {t: answers(0.6 + 10 * lift, 10_000 + 100 * seed + n, like=base[t])
               for n, t in enumerate(TASKS)}  # fmt: skip
        parts["baseline", seed], parts["proxyv-early", seed] = base, arm
    for (arm_name, seed), own in parts.items():
        put(folder, plan, content(arm_name, seed, own))
    blind = {task: own * (answers(0.3, n) > 0) for n, (task, own) in
             enumerate(parts["baseline", seeds[0]].items())}  # fmt: skip
    put(folder, plan, content("shuffled-images", seeds[0], blind))
    return parts


def rewrite(folder: Path, name: str, change: Any) -> None:
    path = folder / "tiny" / f"{name}.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def report(folder: Path, place: str = "report") -> str:
    output = folder / place / "reproduction.md"
    words = ["--presets", "tiny", "--results", str(folder), "--output", str(output)]
    assert main(["report", *words]) == 0
    return output.read_text(encoding="utf-8")


def cells(text: str, start: str) -> list[str]:
    """Cells of the first table row that begins so."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {start}")][:1]
    return [cell.strip() for cell in line.strip("|").split("|")]


def by_hand(plan: Plan, parts: dict, seeds: tuple[int, ...]) -> tuple[float, float, float, list]:
    """Gap, half of its interval by the normal law, and the gap of each seed, in points."""
    gaps = {
        task: np.mean([parts["proxyv-early", s][task] - parts["baseline", s][task]
                       for s in seeds], axis=0)
        for task in plan.score
    }  # fmt: skip
    value = sum(gap.sum() / QUESTIONS for gap in gaps.values()) / len(gaps)
    variance = sum(gap.var() / QUESTIONS for gap in gaps.values()) / len(gaps) ** 2
    half = 1.96 * variance**0.5
    own = [
        sum((parts["proxyv-early", s][t] - parts["baseline", s][t]).mean() for t in plan.score)
        / len(plan.score)
        for s in seeds
    ]
    return 100 * value, 100 * (value - half), 100 * (value + half), [100 * gap for gap in own]


@pytest.mark.parametrize("lift", [-0.04, -0.02, 0.0, 0.03])
def test_verdicts_are_those_worked_out_by_hand(tmp_path: Path, plan: Plan, lift: float) -> None:
    seeds = (1, 2, 3)
    value, low, high, own = by_hand(plan, fill(tmp_path, plan, lift, seeds), seeds)
    text = report(tmp_path)
    for line, said in (
        (0.0, cells(text, "ProxyV from 3/8 of the depth is better than the baseline")),
        (-1.0, cells(text, "ProxyV from 3/8 of the depth loses nothing")),
    ):
        found = [float(number) for number in re.findall(r"[+-][\d.]+", said[2])]
        assert found == pytest.approx([value, low, high], abs=0.25)
        assert found[0] == pytest.approx(value, abs=0.01)
        seen = [float(number) for number in re.findall(r"[+-][\d.]+", said[3])]
        assert seen == pytest.approx(own, abs=0.01)
        assert min(abs(low - line), abs(high - line)) > 0.25, "too close to be told by hand"
        expected = "cannot tell"
        if low > line and min(own) > line:
            expected = "holds"
        if high < line and max(own) < line:
            expected = "does not hold"
        assert said[5] == f"**{expected}**"
    missing = cells(text, "ProxyV is better than VisionZip")
    assert missing[2] == "not run: visionzip" and missing[5] == "**cannot tell**"


def test_seeds_have_to_agree() -> None:
    gap = Gap(2.0, (1.0, 3.0), 0.001, {1: 4.5, 2: -0.5})
    assert verdict("better", gap, 0.1) == verdict("worse", gap, 0.1) == "cannot tell"
    assert verdict("not worse", gap, 0.1) == "holds"  # both lie above -1
    assert verdict("better", Gap(2.0, (1.0, 3.0), 0.001, {1: 2.0}), 0.1) == "holds"
    worse = Gap(-3.0, (-4.0, -2.0), 0.001, {1: -3.0})
    found = [verdict(rule, worse, 0.5) for rule in ("better", "not worse", "worse")]
    assert found == ["does not hold", "does not hold", "holds"]
    assert verdict("better", "not run: fastv", 0.1) == "cannot tell"
    assert verdict("worse", worse, 0.51) == verdict("worse", worse, None) == "cannot tell"


def test_what_lies_on_the_line_lies_on_no_side() -> None:
    """As an arm beside itself does."""
    same = Gap(0.0, (0.0, 0.0), 1.0, {1: 0.0})
    assert verdict("better", same, 0.1) == verdict("worse", same, 0.1) == "cannot tell"
    assert verdict("not worse", same, 0.1) == "holds"
    edge = Gap(-1.0, (-1.0, -1.0), 0.001, {1: -1.0})
    assert verdict("not worse", edge, 0.1) == "cannot tell"
    assert verdict("worse", edge, 0.1) == "holds"


def test_what_needs_no_image_tells_nothing(tmp_path: Path, plan: Plan) -> None:
    """The baseline keeps 0.9 of one task with other images and a third of the others."""
    parts = fill(tmp_path, plan, -0.04)
    rng = np.random.default_rng(7)
    kept = {task: 0.9 if task == "refcoco_testA" else 1 / 3 for task in TASKS}
    own = {t: x * (rng.random(QUESTIONS) < kept[t]) for t, x in parts["baseline", 1].items()}
    put(tmp_path, plan, content("shuffled-images", 1, own))
    text = report(tmp_path)
    assert cells(text, "ProxyV loses nothing in grounding")[5] == "**cannot tell**"
    for claim in ("ProxyV loses nothing in page parsing", "ProxyV from 3/8 of the depth loses"):
        assert cells(text, claim)[5] == "**does not hold**"
    [share] = re.findall(r"more than 50 %: (.*)\. No claim", text)
    assert re.fullmatch(r"refcoco_testA (89|90|91|92) %", share)
    (tmp_path / "tiny" / "shuffled-images-seed1.json").unlink()
    without = report(tmp_path)
    assert "Of 21 claims 0 hold, 0 do not, 21 cannot be told; 17 of them are the paper's" in without
    assert "No claim about" not in without and "has not been asked with the images" in without


def test_figure_1_has_the_arms_and_no_control(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = fill(tmp_path, plan, 0.02, (1,))
    put(tmp_path, plan, content("shuffled-images", 1, parts["baseline", 1]))
    drawn = []
    monkeypatch.setattr("proxyv.reproduce.report.draw_scores", lambda *given: drawn.append(given))
    assert "baseline, another question's image" in report(tmp_path)
    [(_, _, points)] = drawn
    assert [point.title for point in points] == ["baseline", "ProxyV-L3"]
    assert points[1].flops == pytest.approx(58)


def test_figure_1_places_arms_by_their_gap(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm of one seed, below the baseline of that seed and above that of all."""
    parts = fill(tmp_path, plan, 0.0, (1, 2, 3))
    for seed, rate in ((1, 0.9), (2, 0.5), (3, 0.5)):
        level = {task: answers(rate, 500 + seed) for task in TASKS}
        parts["baseline", seed] = level
        put(tmp_path, plan, content("baseline", seed, level))
    lower = {task: own * (answers(0.9, 600) > 0) for task, own in parts["baseline", 1].items()}
    put(tmp_path, plan, content("visionzip", 1, lower))
    drawn = []
    monkeypatch.setattr("proxyv.reproduce.report.draw_scores", lambda *given: drawn.append(given))
    text = report(tmp_path)
    points = {point.title: point for point in drawn[0][-1]}
    base = 100 * np.mean([parts["baseline", s][t].mean() for s in (1, 2, 3) for t in plan.score])
    gap = 100 * np.mean([(lower[t] - parts["baseline", 1][t]).mean() for t in plan.score])
    zipped = points["VisionZip, untrained"]
    assert zipped.score == pytest.approx(base + gap, abs=0.01)
    assert base + gap < base < 100 * np.mean([lower[t].mean() for t in plan.score])
    ends = [float(x) for x in re.findall(r"[+-][\d.]+", cells(text, "VisionZip, untrained")[4])[1:]]
    assert [zipped.low - base, zipped.high - base] == pytest.approx(ends, abs=0.01)
    assert points["baseline"][3:] == pytest.approx((base, base, base))
    assert points["baseline"].trained and not zipped.trained


def test_figure_2_places_arms_by_their_share_of_proxyv_layers(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One arm from layer 3 of 8, beside a curve whose first score is 30 of the baseline's 60."""
    parts = fill(tmp_path, plan, 0.02, (1,))
    row = {"ratio": 1.0, "layers": 8, "score %": 30.0, "from": 27.0, "to": 33.0, "of base %": 50.0}
    put_curve(tmp_path, [row | {"p": 0.5}])
    drawn = []
    monkeypatch.setattr("proxyv.reproduce.report.draw_curve", lambda *given: drawn.append(given))
    report(tmp_path)
    masked, trained, _ = drawn[0][-1].values()
    assert masked == [pytest.approx((1.0, 50.0, 45.0, 55.0))]
    base, own = (
        np.mean([parts[arm, 1][t].mean() for t in plan.score])
        for arm in ("baseline", "proxyv-early")
    )
    [early] = trained
    assert early[:2] == pytest.approx((5 / 8, 100 * own / base)) and early.low < early.high


def test_other_questions_are_not_compared(tmp_path: Path, plan: Plan) -> None:
    fill(tmp_path, plan, 0.03, (1,))

    def change(found: dict) -> None:
        found["tasks"]["chartqa"]["questions"] = "others"

    rewrite(tmp_path, "proxyv-early-seed1", change)
    table = {(r.arm, r.seed): r for r in read_results(plan, tmp_path / "tiny")}
    assert find_gap(plan, table, CLAIMS[0]) == "chartqa: not the same questions or measure"
    parsing = Claim("", "", "proxyv-early", "baseline", "better", "ccpdf")
    assert isinstance(find_gap(plan, table, parsing), Gap)
    said = cells(report(tmp_path), "ProxyV loses nothing in page parsing")
    assert said[5].endswith("(one seed)**")


def test_a_task_that_a_preset_gained_has_a_dash(tmp_path: Path, plan: Plan) -> None:
    """Files from before lack it, that of one seed has it; the score cannot do without."""
    parts = fill(tmp_path, plan, 0.02, (1, 2))
    newer = content("baseline", 2, parts["baseline", 2])
    newer["tasks"]["gqa"] = newer["tasks"]["chartqa"]
    put(tmp_path, plan, newer)
    measures = {**plan.measures, "gqa": MEASURES["chartqa"]}  # that of the copied entry
    gained = replace(plan, tasks={**plan.tasks, "gqa": 1000}, measures=measures)
    output = tmp_path / "gained.md"
    write_report([gained], tmp_path, output)
    _, _, every_task = output.read_text(encoding="utf-8").partition("Every task")
    for arm, title in (("baseline", "baseline |"), ("proxyv-early", "ProxyV-L3 |")):
        own = [100 * np.mean([parts[arm, seed][t] for seed in (1, 2)]) for t in TASKS]
        assert cells(every_task, title)[1:] == [*(f"{value:.1f}" for value in own), "–"]
    table = {(r.arm, r.seed): r for r in read_results(gained, tmp_path / "tiny")}
    with pytest.raises(ValueError, match=r"gqa was not asked in baseline-seed1\.json: move"):
        seed_parts([table["baseline", seed] for seed in (1, 2)], "gqa")


def test_the_same_files_give_the_same_bytes(tmp_path: Path, plan: Plan) -> None:
    parts = fill(tmp_path, plan, 0.02)
    # It differs from the baseline by more than where it starts, so it is no point of the curve.
    put(tmp_path, plan, content("average", 1, parts["baseline", 2]))
    rows = [
        {"ratio": layers / 8, "layers": layers, "score %": 60 - 2 * layers,
         "from": 58 - 2 * layers, "to": 62 - 2 * layers, "of base %": 100 - 4 * layers, "p": 0.5}
        for layers in (0, 4, 5, 8)
    ]  # fmt: skip
    put_curve(tmp_path, rows)
    first, second = report(tmp_path, "first"), report(tmp_path, "second")
    assert first == second
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    figures = ["reproduction-tiny-curve.png", "reproduction-tiny-scores.png"]
    assert names == [*figures, "reproduction.md"]
    for name in figures:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
        assert f"({name})" in first
    share = cells(first, "0.5 ")
    assert share == ["0.5", "52.00 (50.00 to 54.00)", "0.5000", "84.0", "–", "100.2"]
    early = cells(first, "ProxyV-L3 | tier 1")[5]  # from layer 3 of 8: five layers
    assert cells(first, "0.625")[4:] == [early, "94.5"] and early != "–"
    assert cells(first, "[tiny/redundancy.json]")[1] == "1"


def put_curve(folder: Path, rows: list[dict]) -> None:
    """The file of the redundancy study."""
    plan = find_plan("tiny")
    made = {
        "versions": {"torch": "2.13.0"},
        "hardware": {"device": "a processor"},
        "weights": "those of baseline, seed 1",
        "settings": {"tasks": ",".join(plan.score), "ratios": plan.curve, "limit": 1000},
        "world": dict(plan.world),
    }
    path = folder / "tiny" / CURVE
    path.write_text(json.dumps({"rows": rows, "commit": "0123456789abcdef", **made}))


def test_a_baseline_that_has_nothing_right(tmp_path: Path, plan: Plan) -> None:
    """No share of its score exists, and nothing breaks."""
    parts = fill(tmp_path, plan, 0.0, (1, 2))
    for seed in (1, 2):
        nothing = {task: 0 * own for task, own in parts["baseline", seed].items()}
        put(tmp_path, plan, content("baseline", seed, nothing))
    put(tmp_path, plan, content("shuffled-images", 1, parts["baseline", 1]))
    row = {"ratio": 0.0, "layers": 0, "score %": 0.0, "from": 0.0, "to": 0.0, "of base %": None}
    put_curve(tmp_path, [row | {"p": 1.0}])
    text = report(tmp_path)
    assert cells(text, "0 |") == ["0", "0.00 (0.00 to 0.00)", "1.0000", "–", "–", "–"]
    put_curve(tmp_path, [row | {"p": 1.0}, row | {"p": 1.0, "ratio": 1.0, "layers": 8}])
    assert cells(report(tmp_path), "1 |")[3:] == ["–", "–", "62.7"]
    assert cells(text, "ProxyV loses nothing in grounding")[5] == "**cannot tell**"


def test_controls_of_other_questions_are_not_used(tmp_path: Path, plan: Plan) -> None:
    """A share is of the same questions, and tasks of unlike length count alike."""
    parts = fill(tmp_path, plan, 0.0, (1,))["baseline", 1]
    short = {task: own[: 100 + 10 * n] for n, (task, own) in enumerate(parts.items())}
    put(tmp_path, plan, content("baseline", 1, short))
    put(tmp_path, plan, content("shuffled-images", 1, short))
    table = {(r.arm, r.seed): r for r in read_results(plan, tmp_path / "tiny")}
    assert blind_share(plan, table, plan.score) == 1.0
    assert blind_share(plan, table, ["mme"]) is None
    rewrite(
        tmp_path,
        "shuffled-images-seed1",
        lambda found: found["tasks"]["docvqa"].update(questions="others"),
    )
    table = {(r.arm, r.seed): r for r in read_results(plan, tmp_path / "tiny")}
    assert blind_share(plan, table, plan.score) is None
    assert blind_share(plan, table, ["chartqa"]) == 1.0


def test_seeds_of_an_arm_are_its_own_or_those_of_its_tier(plan: Plan) -> None:
    """A control has those of later tiers, whatever its own."""
    first, control, second = (
        replace(plan.arms[name], seeds=None)
        for name in ("baseline", "shuffled-images", "nonspatial-early")
    )
    assert (first.tier, control.tier, second.tier) == (1, 1, 2)
    for later, expected in (([2, 3], [2, 3]), (None, plan.seeds[:1])):
        given = replace(plan, later_seeds=later)
        assert given.seeds_of(first) == plan.seeds
        assert given.seeds_of(control) == given.seeds_of(second) == expected
    assert plan.seeds_of(replace(control, seeds=[3])) == [3]


def test_of_several_controls_the_one_that_keeps_the_most_counts(plan: Plan) -> None:
    """Of those of the baseline: what another model keeps says nothing of it."""
    shuffled = plan.arms["shuffled-images"]
    more = {
        "blank": replace(shuffled, name="blank", control="blank-images"),
        "foreign": replace(shuffled, name="foreign", checkpoint="proxyv-early"),
    }
    several = replace(plan, arms={**plan.arms, **more})
    table = {}
    for name, share in (
        *(("baseline", 1), ("shuffled-images", 0.25)),
        *(("blank", 0.5), ("foreign", 0.75)),
    ):
        right = (np.arange(QUESTIONS) < share * QUESTIONS).astype(float)
        table[name, 1] = Result(Path(name), content("baseline", 1, {"docvqa": right}))
    assert blind_share(several, table, ["docvqa"]) == 0.5


def test_numbers_of_the_main_table(tmp_path: Path, plan: Plan) -> None:
    parts = fill(tmp_path, plan, 0.02)
    put(tmp_path, plan, content("proxyv-early-long", 1, parts["proxyv-early", 1]))
    text = report(tmp_path)
    longer = cells(text, "ProxyV-L3, stage 2 twice as long")
    assert longer[4:6] == ["–", "–"]  # the baseline was not trained for as long
    row, cost = cells(text, "ProxyV-L3 | tier 1"), cells(text, "ProxyV-L3 | 42.0")
    expected = 100 * np.mean(
        [parts["proxyv-early", s][t].mean() for s in (1, 2, 3) for t in plan.score]
    )
    assert row[2] == "3" and float(row[3].split()[0]) == pytest.approx(expected, abs=0.01)
    times = ["40.0 (10 to 50)", "41", "20.0 (10 to 30)"]
    assert cost[1:] == ["42.0", "46", "33.3", *times]
    noise = cells(text, "baseline | 42.0")[4:]  # beside a second one; these files say it is faster
    assert noise == [times[0], "–", times[2]]
    base = 100 * np.mean([parts["baseline", s][t].mean() for s in (1, 2, 3) for t in plan.score])
    assert row[5:] == [f"{100 * expected / base:.1f}", "101.0"]
    command = "`bash scripts/reproduce.sh tiny --arms proxyv-early --seeds 2`"
    assert cells(text, "[tiny/proxyv-early-seed2.json]")[1:] == [
        *("2", "0123456789", "auto", "0123456789", "a processor", "2.13.0", command)
    ]
    untrained = cells(text, "[tiny/shuffled-images-seed1.json]")[-1]
    assert untrained.endswith("--arms baseline,shuffled-images --seeds 1`")


def test_variants_stand_beside_what_they_are_a_variant_of(tmp_path: Path, plan: Plan) -> None:
    parts = fill(tmp_path, plan, 0.02, (1, 2))
    assert "| variant |" not in report(tmp_path)
    average = {task: answers(0.5, 70 + n) for n, task in enumerate(TASKS)}
    put(tmp_path, plan, content("average", 2, average))
    put(tmp_path, plan, content("nonspatial-early", 3, average))
    text = report(tmp_path)
    gap, seeds, _, flops = cells(text, "block average | ProxyV-L3 |")[2:]
    early = parts["proxyv-early", 2]
    expected = 100 * np.mean([(average[task] - early[task]).mean() for task in plan.score])
    assert float(gap.split()[0]) == pytest.approx(expected, abs=0.01)
    assert seeds == f"2: {gap.split()[0]}" and flops == "42.0, 42.0"
    assert cells(text, "ProxyV-L3, non-spatial | ProxyV-L3 |")[2:5] == [
        *("not run with the same seed", "–", "–")
    ]


def test_another_measure_counts_and_a_distance_is_turned_round(tmp_path: Path) -> None:
    record = {"index": 0, "question_id": "0", "error": None, "document": None, "details": {}}
    records = [
        record | {"answer": answer, "references": ["one two three four five"], "score": 0.0}
        for answer in ("one two three four five", "one two three four fire", "")
    ]
    plain, other = task_entry("ccpdf", records), task_entry("ccpdf", records, "doc_edit_distance")
    assert plain["measure"] == "doc_bleu" and {*plain["scores"]} == {"doc_bleu"}
    assert {*other["scores"]} == {"doc_bleu", "doc_edit_distance"}
    assert unpack(other["scores"]["doc_edit_distance"]) == pytest.approx([0, 1 / 23, 1], abs=1e-6)
    result = Result(tmp_path, {"tasks": {"ccpdf": other}})
    assert result.parts("ccpdf") == pytest.approx([1, 22 / 23, 0], abs=1e-6)
    assert Result(tmp_path, {"tasks": {"ccpdf": plain}}).parts("ccpdf") == [0, 0, 0]
    with pytest.raises(ValueError, match="'doc_blue' is not one of doc_bleu, doc_edit_distance"):
        task_entry("ccpdf", records, "doc_blue")


def test_what_was_not_run_or_failed_is_listed(tmp_path: Path, plan: Plan) -> None:
    empty = report(tmp_path)
    assert "nothing has been run" in empty
    assert all(trouble in empty for trouble in plan.went_wrong) and plan.went_wrong
    assert all(job.name in empty for job in plan.jobs())
    fill(tmp_path, plan, 0.0, (1,))
    seed = plan.seeds_of(plan.arms["fastv"])[0]
    failed = {"preset": "tiny", "arm": "fastv", "seed": seed, "status": "failed", "commit": None}
    put(tmp_path, plan, failed | {"error": "ValueError: no memory"})
    text = report(tmp_path)
    tier_1 = sum(job.arm.tier == 1 for job in plan.jobs())
    assert "nothing has been run" not in text and f"3 of {tier_1} results of tier 1" in text
    own = cells(text, plan.claims[0].text)
    assert own[2] == "not run: start-5" and own[5] == "**cannot tell**"
    assert f"- fastv-seed{seed}: ValueError: no memory" in text
    [left] = [line for line in text.splitlines() if line.startswith("- tier 1:")]
    assert "proxyv-late-seed1" in left and "proxyv-early-seed2" in left
    assert "baseline-seed1" not in left and "proxyv-early-seed1" not in left
    assert "fastv" not in next(x for x in text.splitlines() if x.startswith("- tier 2:"))


def changed(key: str, value: Any) -> Any:
    """A change to a result file: ``settings.world.seed`` and the like."""

    def change(found: dict) -> None:
        *path, last = key.split(".")
        for part in path:
            found = found[part]
        found[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("settings.arm.model", {"start_layer": 2}, "arm.model is {'start_layer': 2} there"),
        ("settings.arm.control", "blank-images", "arm.control is 'blank-images' there, and None"),
        ("settings.world.seed", 1, "world.seed is 1 there, and 2026 in the preset tiny"),
        ("settings.world.side_px", 224, "world.side_px is 224 there, and None in"),
        ("settings.evaluation.answer_tokens.ccpdf", 8, "evaluation.answer_tokens.ccpdf is 8 there"),
        ("settings.finetune.optim.lr", 0.5, "finetune: optim.lr is 0.5 there"),
        ("settings.pretrain.run.seed", 3, "pretrain: run.seed is 3 there, and 1 in"),
        ("tasks.docvqa.samples", 2000, "the number of questions of docvqa is 2000 there"),
        ("weights", "others", "is of a model with weights"),
    ],
)
def test_results_of_another_preset_than_todays_are_refused(
    tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str], key: str, value: Any, said: str
) -> None:
    fill(tmp_path, plan, 0.0, (1,))
    name = "shuffled-images-seed1" if key == "weights" else "proxyv-early-seed1"
    rewrite(tmp_path, name, changed(key, value))
    places = ["--results", str(tmp_path)]
    words = ["report", "--presets", "tiny", *places, "--output", str(tmp_path / "report.md")]
    assert run_command(main, words) == 2
    error = capsys.readouterr().err
    assert said in error and name in error and "move" in error
    if key != "weights":  # that takes two files
        for command in ("status", "run"):
            runs = ["--runs", str(tmp_path / "runs"), "--arms", "proxyv-early", "--seeds", "1"]
            assert run_command(main, [command, *places, *runs]) == 2
            assert said in capsys.readouterr().err
        assert not (tmp_path / "runs" / "tiny" / "world").exists()  # nothing was begun


def test_what_does_not_change_a_result_may_differ(tmp_path: Path, plan: Plan) -> None:
    """Where it was run, how often it was saved, and what was decided by the machine."""
    fill(tmp_path, plan, 0.0, (1,))
    for key, value in (
        ("settings.finetune.run.output_dir", "/other/tiny/proxyv-early-seed1/finetune"),
        ("settings.finetune.data.annotations", "/other/tiny/world/llava_next/conversations.json"),
        ("settings.finetune.data.images", "/other/tiny/world"),
        ("settings.finetune.model.init_from", "/other/tiny/proxyv-early-seed1/pretrain"),
        ("settings.finetune.run.save_steps", 7),
        ("settings.evaluation.batch_size", 1),
        ("tasks.docvqa.samples", plan.tasks["docvqa"]),  # all that are asked for
    ):
        rewrite(tmp_path, "proxyv-early-seed1", changed(key, value))
    assert "ProxyV-L3" in report(tmp_path)


def test_what_a_file_does_not_say_was_none(tmp_path: Path, plan: Plan) -> None:
    """It is from before the key came: where the preset says something now, that is new."""
    fill(tmp_path, plan, 0.0, (1,))
    rewrite(tmp_path, "proxyv-early-seed1", lambda found: found["settings"]["arm"].pop("control"))
    assert len(read_results(plan, tmp_path / "tiny")) == 3
    rewrite(tmp_path, "proxyv-early-seed1", lambda found: found["settings"]["world"].pop("seed"))
    with pytest.raises(CommandError, match=r"world\.seed is None there, and 2026 in the preset"):
        read_results(plan, tmp_path / "tiny")


def test_arms_of_a_seed_are_trained_in_one_type(
    tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are compared seed by seed; what the machine decided may differ between seeds."""
    fill(tmp_path, plan, 0.0, (1, 2))
    for name in ("baseline-seed1", "proxyv-early-seed1", "shuffled-images-seed1"):
        rewrite(tmp_path, name, changed("settings.finetune.model.dtype", "bfloat16"))
    text = report(tmp_path)
    assert cells(text, "[tiny/baseline-seed1.json]")[3] == "bfloat16"
    assert cells(text, "[tiny/baseline-seed2.json]")[3] == "auto"
    folder = tmp_path / "tiny"
    assert (seed_dtype(folder, 1), seed_dtype(folder, 2), seed_dtype(folder, 3)) == (
        *("bfloat16", "auto"),
        None,
    )
    rewrite(tmp_path, "baseline-seed2", lambda found: found.update(status="failed", error="x"))
    assert seed_dtype(folder, 2) == "auto"  # of the other arm
    rewrite(tmp_path, "baseline-seed1", changed("settings.finetune.model.dtype", "float32"))
    output = ["--output", str(tmp_path / "report.md")]
    words = ["report", "--presets", "tiny", "--results", str(tmp_path), *output]
    assert run_command(main, words) == 2
    assert "was trained in bfloat16 and baseline-seed1.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("weights", "others", "weights: others there, and those of baseline, seed 1 in"),
        ("settings.tasks", "docvqa", "tasks: docvqa there, and docvqa,chartqa,"),
        ("settings.ratios", "0,1", "shares: 0,1 there, and 0,0.125,"),
        ("settings.limit", 10, "questions of a task: 10 there, and 1000 in"),
        ("world.printed", False, "'printed': False"),
    ],
)
def test_a_curve_that_was_made_otherwise_is_refused(
    tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str], key: str, value: Any, said: str
) -> None:
    fill(tmp_path, plan, 0.0, (1,))
    put_curve(tmp_path, [])
    rewrite(tmp_path, "redundancy", changed(key, value))
    words = ["report", "--presets", "tiny", "--results", str(tmp_path)]
    assert run_command(main, [*words, "--output", str(tmp_path / "report.md")]) == 2
    error = capsys.readouterr().err
    assert said in error and "move it" in error


def test_the_committed_report_is_that_of_the_committed_files(tmp_path: Path) -> None:
    output = tmp_path / "reproduction.md"
    assert main(["report", "--output", str(output)]) == 0
    committed = Path("docs/results/reproduction.md").read_text(encoding="utf-8")
    assert output.read_text(encoding="utf-8") == committed, "python -m proxyv.reproduce report"


def test_results_that_are_not_there_are_no_empty_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", "--results", str(tmp_path / "none"), "--output", str(tmp_path / "a.md")]
    assert run_command(main, words) == 2
    assert "there is no such folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_another_folder_than_the_repository_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would find no result, and say that nothing was run."""
    monkeypatch.chdir(tmp_path)
    for command in ("status", "run", "report"):
        assert run_command(main, [command]) == 2
        assert f"cd {ROOT} first" in capsys.readouterr().err
    assert run_command(main, ["status", "--results", str(tmp_path)]) == 0


def test_a_copy_that_was_put_aside_is_refused(
    tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers would stand in place of those of the file that it was copied from."""
    fill(tmp_path, plan, 0.0, (1,))
    folder = tmp_path / "tiny"
    (folder / "baseline-seed1_old.json").write_bytes((folder / "baseline-seed1.json").read_bytes())
    words = ["report", "--presets", "tiny", "--results", str(tmp_path)]
    assert run_command(main, [*words, "--output", str(tmp_path / "report.md")]) == 2
    assert "baseline-seed1_old.json holds what is baseline-seed1.json" in capsys.readouterr().err


def test_damaged_and_foreign_files_are_refused(
    tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, plan, 0.0, (1,))
    words = ["report", "--presets", "tiny", "--results", str(tmp_path)]
    words += ["--output", str(tmp_path / "report.md")]
    rewrite(tmp_path, "baseline-seed1", lambda found: found.update(preset="smol"))
    assert run_command(main, words) == 2
    assert "preset is 'smol' there, and 'tiny' in the preset tiny" in capsys.readouterr().err
    fill(tmp_path, plan, 0.0, (1,))
    rewrite(
        tmp_path,
        "baseline-seed1",
        lambda found: found["tasks"]["ccpdf"].update(measure="doc_bleu"),
    )
    assert run_command(main, words) == 2
    said = "the measure of ccpdf is 'doc_bleu' there, and 'doc_edit_distance' in the preset"
    assert said in capsys.readouterr().err
    (tmp_path / "tiny" / "baseline-seed1.json").write_text('{"preset":')
    assert run_command(main, words) == 2
    assert "is damaged" in capsys.readouterr().err
    (tmp_path / "tiny" / "baseline-seed1.json").write_text('{"preset": "tiny"}')
    assert run_command(main, words) == 2
    assert "has no arm, seed, status" in capsys.readouterr().err
