"""The reproduction's commands on a miniature world: interrupted, resumed, failed, repeated."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_training import make_backbones
from transformers import AutoTokenizer, TrainerCallback

from proxyv.cli import run_command
from proxyv.eval.answerer import Answerer
from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.eval.images import row_images
from proxyv.eval.records import read_records
from proxyv.eval.sources import load_rows
from proxyv.files import write_json
from proxyv.model.crops import crop_layout
from proxyv.model.flops import RowTokens, paper_flops
from proxyv.profiling.costs import decoder_flops
from proxyv.profiling.shapes import with_start
from proxyv.reproduce import work
from proxyv.reproduce.__main__ import main
from proxyv.reproduce.cost import baseline_config
from proxyv.reproduce.plan import Arm, Job, choose, find_plan, presets, read_plan
from proxyv.reproduce.progress import JobState, job_states, left_seconds
from proxyv.reproduce.results import pack, unpack
from proxyv.reproduce.work import run_job, stage_settings
from proxyv.study.kept import kept_patches
from proxyv.study.redundancy import layer_counts
from proxyv.synthetic.training_kinds import Sizes, draw_row
from proxyv.train import run as train_run
from proxyv.train.build import build, build_on_meta, resolve
from proxyv.train.lock import only_run

ROOT = Path(__file__).resolve().parents[1]

STAGE = """
model: {{name: mini, language: {folder}/language, vision: {folder}/vision, start_layer: 1,
  vision_feature_layer: -1, template: tiny, dtype: float32}}
data: {{workers: 0, max_length: 2048}}
optim: {{global_batch: 2, micro_batch: 2, lr: 1.0e-3, max_steps: 2}}
stage: {{name: {stage}}}
run: {{gradient_checkpointing: false, save_steps: 1}}
deepspeed: {{config: null}}
"""
PLAN = """
name: mini
title: a miniature
pretrain: {folder}/pretrain.yaml
finetune: {folder}/finetune.yaml
world: {{seed: 3, train_documents: 4, train_charts: 2, train_further: 1, test_documents: 2,
  test_charts: 2, workers: 1}}
tasks: {{docvqa: 4, chartqa: 4}}
score: [docvqa, chartqa]
seeds: [1, 2]
batch_size: 4
answer_tokens: {{docvqa: 8}}
cost: {{crops: 2, text: 9, repeats: 2}}
names: {{early: 1}}
arms:
  baseline: {{tier: 1, title: baseline, model: {{start_layer: null}}}}
  proxyv-early:
    {{tier: 1, title: "ProxyV-L${{names.early}}", model: {{start_layer: "${{names.early}}"}}}}
  fastv: {{tier: 2, title: FastV, checkpoint: baseline, reduction: {{method: fastv, layer: 1}}}}
  prumerge: {{tier: 2, title: PruMerge, checkpoint: baseline, reduction: {{method: prumerge}}}}
  blind: {{tier: 2, title: blind, checkpoint: baseline, control: blank-images}}
  wrong: {{tier: 3, title: wrong, model: {{start_layer: 9}}}}
  longer: {{tier: 3, title: longer, model: {{start_layer: null}}, pretrained: baseline,
    finetune: {{optim: {{max_steps: 3}}}}}}
  dropping: {{tier: 3, title: dropping, pretrained: baseline,
    model: {{start_layer: null, reduction: {{method: pyramiddrop, layers: [1], ratios: [0.5]}}}}}}
  pooling: {{tier: 3, title: pooling, pretrained: baseline,
    model: {{start_layer: null, reduction: {{method: average_pool, block: 2}}}}}}
"""


CLAIM = 'claims: [{text: t, paper: "-", arm: fastv, other: baseline, rule: worse, task: docvqa}]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones and a preset."""
    folder = tmp_path_factory.mktemp("reproduce")
    make_backbones(folder)
    for stage in ("pretrain", "finetune"):
        text = STAGE.format(folder=folder, stage=stage)
        if stage == "finetune":
            text = text.replace("dtype: float32", "dtype: float32, init_from: auto")
        (folder / f"{stage}.yaml").write_text(text)
    (folder / "mini.yaml").write_text(PLAN.format(folder=folder))
    return folder


def run(folder: Path, *words: str, runs: str = "runs") -> int:
    places = ["--runs", str(folder / runs), "--results", str(folder / f"{runs}-results")]
    return main(["run", "--preset", str(folder / "mini.yaml"), *places, *words])


def content(folder: Path, name: str, runs: str = "runs") -> dict[str, Any]:
    path = folder / f"{runs}-results" / "mini" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


class StopAfter(TrainerCallback):
    """Sends this process SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module", autouse=True)
def known_commit() -> Iterator[None]:
    """A commit that no commit made meanwhile changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "git_commit", lambda: "c0ffee0")
        yield


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> Path:
    """Two arms, told to stop in the second arm's stage 1, then started again."""
    built = train_run._trainer

    def stopping(settings, *rest):
        trainer = built(settings, *rest)
        if settings.model.start_layer == 1:
            trainer.add_callback(StopAfter(1))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run, "_trainer", stopping)
        assert run(folder, "--seeds", "1") == 128 + signal.SIGTERM
    results = folder / "runs-results" / "mini"
    assert [path.name for path in results.glob("*.json")] == ["baseline-seed1.json"]
    first = (results / "baseline-seed1.json").read_bytes()
    assert run(folder, "--seeds", "1") == 0
    assert (results / "baseline-seed1.json").read_bytes() == first  # done, so left alone
    return folder


def test_a_stopped_arm_goes_on_and_a_repeated_one_scores_the_same(interrupted: Path) -> None:
    assert run(interrupted, "--arms", "proxyv-early", "--seeds", "1", runs="again") == 0
    resumed, again = (content(interrupted, "proxyv-early-seed1", r) for r in ("runs", "again"))
    assert resumed["training"]["pretrain"]["sessions"] == 2
    assert resumed["training"]["finetune"]["commits"] == ["c0ffee0"]
    assert again["training"]["pretrain"]["sessions"] == 1
    assert resumed["weights"] == again["weights"]
    for task in ("docvqa", "chartqa"):
        assert resumed["tasks"][task]["scores"] == again["tasks"][task]["scores"]
        assert resumed["tasks"][task]["questions"] == again["tasks"][task]["questions"]
    assert (
        resumed["training"]["pretrain"]["loss"]
        != content(interrupted, "baseline-seed1")["training"]["pretrain"]["loss"]
    )


def test_a_result_file_holds_what_its_numbers_depend_on(interrupted: Path) -> None:
    found = content(interrupted, "proxyv-early-seed1")
    assert (found["preset"], found["arm"], found["seed"], found["status"]) == (
        *("mini", "proxyv-early", 1),
        "done",
    )
    assert found["settings"]["finetune"]["model"]["start_layer"] == 1
    assert found["settings"]["pretrain"]["run"]["seed"] == 1
    assert found["settings"]["world"]["seed"] == 3
    assert {"torch", "transformers"} <= found["versions"].keys() and found["hardware"]["device"]
    answers = interrupted / "runs" / "mini" / "proxyv-early-seed1" / "eval" / "docvqa"
    records = read_records(answers / "docvqa.jsonl")
    entry = found["tasks"]["docvqa"]
    assert unpack(entry["scores"]["anls"]) == pytest.approx([r["score"] for r in records], rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(interrupted / "language")
    lengths = [len(tokenizer.tokenize(record["answer"])) for record in records]
    assert found["settings"]["evaluation"]["answer_tokens"] == {"docvqa": 8}
    assert max(lengths) <= 8
    assert entry["value"] == pytest.approx(sum(r["score"] for r in records) / 4)
    sessions = json.loads((answers / "sessions.json").read_text())
    assert entry["seconds"] == pytest.approx(sum(s["seconds"] for s in sessions), abs=0.1)
    assert sessions[0]["seconds"] > 0 and sessions[0].keys() == {"commit", "seconds"}
    cost = found["cost"]
    for what in ("prefill", "step"):
        assert len(cost[f"{what}_seconds"]) == len(cost[f"baseline_{what}_seconds"]) == 2
    assert 0 < cost["flops"]["paper"] < cost["baseline_flops"]["paper"]


def kept_by_the_tower(folder: Path, crops: int) -> float:
    """Mean tokens that PruMerge leaves of pages of one crop: kept patches, and one for the rest."""
    model, world = folder / "runs/mini/baseline-seed1/finetune", folder / "runs/mini/world"
    answerer = Answerer.load(str(model), reduction={"method": "prumerge"})
    rows, kept = load_rows(BENCHMARKS["docvqa"], world), []
    for place in range(crops):
        image = row_images(BENCHMARKS["docvqa"], rows, place * len(rows) // crops)[0].load()
        kept.append(int(kept_patches(answerer, "What?", [image]).sum()) + 1)
    return sum(kept) / crops


def test_training_free_arms_use_the_baselines_model_and_a_failure_stops_no_other(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(interrupted, "--arms", "wrong,fastv,prumerge,blind", "--seeds", "1") == 1
    fastv, base = (content(interrupted, name) for name in ("fastv-seed1", "baseline-seed1"))
    assert fastv["weights"] == base["weights"] and fastv["training"]["of"] == "baseline-seed1"
    assert fastv["settings"]["evaluation"]["reduction"] == {"method": "fastv", "layer": 1}
    prumerge = content(interrupted, "prumerge-seed1")["cost"]
    assert prumerge["kept"] == kept_by_the_tower(interrupted, crops=2)
    assert prumerge["flops"]["paper"] < prumerge["baseline_flops"]["paper"]
    assert prumerge["step_seconds"] is None  # it was not trained
    assert not (interrupted / "runs" / "mini" / "fastv-seed1" / "pretrain").exists()
    blind = content(interrupted, "blind-seed1")
    for task, entry in blind["tasks"].items():  # the same questions, so scores pair
        assert entry["questions"] == base["tasks"][task]["questions"]
        answers = interrupted / "runs" / "mini" / "blind-seed1" / "eval" / task / "results.json"
        assert json.loads(answers.read_text())["settings"]["control"] == "blank-images"
    assert blind["cost"]["flops"] == blind["cost"]["baseline_flops"]
    wrong = content(interrupted, "wrong-seed1")
    assert wrong["status"] == "failed" and "start_layer=9" in wrong["error"]
    assert "1 arms failed: wrong-seed1" in capsys.readouterr().err
    places = ["--runs", str(interrupted / "runs"), "--results", str(interrupted / "runs-results")]
    preset = ["--preset", str(interrupted / "mini.yaml")]
    assert main(["status", *preset, *places, "--tiers", "1,2,3", "--json"]) == 0
    states = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert {name: line["state"] for name, line in states.items()} == {
        "baseline-seed1": "done",
        "proxyv-early-seed1": "done",
        "baseline-seed2": "not run",
        "proxyv-early-seed2": "not run",
        "fastv-seed1": "done",
        "prumerge-seed1": "done",
        "blind-seed1": "done",
        "wrong-seed1": "failed",
        "longer-seed1": "not run",
        "dropping-seed1": "not run",
        "pooling-seed1": "not run",
    }
    answering = sum(task["seconds"] for task in fastv["tasks"].values())
    assert states["fastv-seed1"]["seconds"] == pytest.approx(answering)
    answering = sum(task["seconds"] for task in base["tasks"].values())
    training = sum(base["training"][stage]["seconds"] for stage in ("pretrain", "finetune"))
    assert states["baseline-seed1"]["seconds"] == pytest.approx(answering + training)


def test_an_arm_goes_on_from_the_stage_1_of_another(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stage 2 was killed once, which leaves a session without an end."""
    clock = interrupted / "runs" / "mini" / "longer-seed1" / "finetune" / "sessions.json"
    clock.parent.mkdir(parents=True)
    killed = {"commit": "c0ffee", "seconds": None}
    clock.write_text(json.dumps([killed]))

    def train(settings: Any) -> Path:
        first, second = json.loads(clock.read_text())
        assert first == killed and second["seconds"] is None and second["commit"]
        return train_run.train(settings)

    monkeypatch.setattr(work, "train", train)
    assert run(interrupted, "--arms", "longer", "--seeds", "1") == 0
    base, longer = (content(interrupted, name) for name in ("baseline-seed1", "longer-seed1"))
    assert longer["training"]["pretrain"] == base["training"]["pretrain"]
    assert [one["training"]["finetune"]["steps"] for one in (base, longer)] == [2, 3]
    assert not (interrupted / "runs" / "mini" / "longer-seed1" / "pretrain").exists()
    assert longer["weights"] != base["weights"]
    assert longer["settings"]["finetune"]["optim"]["max_steps"] == 3
    sessions = json.loads(clock.read_text())
    training = longer["training"]["finetune"]
    assert training["sessions"] == 2 and training["commits"][0] == "c0ffee"
    assert training["seconds"] == sessions[1]["seconds"] > 0
    plan, folder = read_plan(interrupted / "mini.yaml"), interrupted / "runs-results" / "mini"
    [state] = job_states(plan, [Job(plan.arms["longer"], 1)], folder, interrupted / "runs")
    answering = sum(task["seconds"] for task in longer["tasks"].values())
    assert state.seconds == pytest.approx(answering + longer["training"]["finetune"]["seconds"])


METHODS = {
    "dropping": {"method": "pyramiddrop", "layers": [1], "ratios": [0.5]},
    "pooling": {"method": "average_pool", "block": 2},
}


@pytest.mark.parametrize("arm", METHODS)
def test_stage_2_is_trained_with_a_method_from_the_stage_1_without(
    interrupted: Path, arm: str
) -> None:
    """What is left out, is while it trains, is evaluated, and is timed; of either kind."""
    assert run(interrupted, "--arms", arm, "--seeds", "1") == 0
    base, found = (content(interrupted, f"{name}-seed1") for name in ("baseline", arm))
    method = METHODS[arm]
    assert found["training"]["pretrain"] == base["training"]["pretrain"]
    folders = [interrupted / "runs" / "mini" / f"{name}-seed1" for name in ("baseline", arm)]
    weights = [(folder / "finetune" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] != weights[1]  # although all else of the training is alike
    settings = found["settings"]
    assert settings["pretrain"]["model"]["reduction"] == {}
    assert settings["finetune"]["model"]["reduction"] == method
    assert settings["evaluation"]["reduction"].items() >= method.items()
    cost = found["cost"]
    assert cost["flops"]["paper"] < cost["baseline_flops"]["paper"]
    assert cost["baseline_flops"] == base["cost"]["flops"]
    assert len(cost["step_seconds"]) == len(cost["baseline_step_seconds"]) == 2
    forgotten = read_plan(interrupted / "mini.yaml").stage(
        Job(Arm("later", "later", 3, {"start_layer": None}), 1), "finetune", interrupted / "runs"
    )
    forgotten.model.init_from = str(interrupted / "runs" / "mini" / f"{arm}-seed1" / "finetune")
    with pytest.raises(
        ValueError, match=rf"model\.reduction=None contradicts .*{method['method']}"
    ):
        build(resolve(forgotten))


def test_a_changed_preset_is_refused(interrupted: Path, tmp_path: Path) -> None:
    changed = PLAN.format(folder=interrupted).replace("seed: 3", "seed: 4")
    (tmp_path / "mini.yaml").write_text(changed)
    places = ["--runs", str(interrupted / "runs"), "--results", str(tmp_path)]
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 4.*models .* move all of .*runs"):
        main(["run", "--preset", str(tmp_path / "mini.yaml"), "--seeds", "1", *places])
    assert not list(tmp_path.glob("**/*.json"))  # before any arm


def test_runs_beside_each_other_share_the_arms(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While another process works on the baseline, what needs its model is left to that one."""
    ours = ["--arms", "prumerge,proxyv-early", "--seeds", "1", "--results", str(tmp_path)]
    with only_run(interrupted / "runs" / "mini" / "baseline-seed1"):
        assert run(interrupted, *ours) == 0
        assert "left to other runs: prumerge-seed1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("mini/*")] == ["proxyv-early-seed1.json"]
    assert run(interrupted, *ours) == 0
    assert (tmp_path / "mini" / "prumerge-seed1.json").is_file()


def test_a_shared_stage_1_is_waited_for(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arm that trains it is held by another process until just before it is looked at."""
    order = []
    looked_at = work.train_job

    def train_job(plan, job, stage, runs, dtype):
        order.append(f"{job.name} {stage}")
        return looked_at(plan, job, stage, runs, dtype)

    monkeypatch.setattr(work, "train_job", train_job)
    held, name = threading.Event(), "baseline-seed1"

    def hold() -> None:
        with only_run(interrupted / "runs" / "mini" / name):
            held.set()
            time.sleep(1.5)
            order.append("let go")

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    ours = ["--arms", "longer", "--seeds", "1", "--results", str(tmp_path)]
    assert run(interrupted, *ours) == 0
    other.join()
    assert order == ["let go", f"{name} pretrain", "longer-seed1 finetune"]


def test_a_curve_in_other_hands_is_not_waited_for(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("proxyv.reproduce.__main__._DYING_SECONDS", 0.2)
    with only_run(interrupted / "runs" / "mini" / "redundancy"):
        assert run(interrupted, "--arms", "baseline", "--seeds", "1") == 0
    assert "left to another run: the redundancy curve" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_goes_on_in_the_type_that_it_began_in(
    dtype: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine multiplies faster; a preset that names a type is followed."""
    monkeypatch.setattr("proxyv.train.build._multiplies_bfloat16", lambda: dtype == "float32")
    plan, runs = find_plan("tiny"), Path("runs")
    job = Job(plan.arms["baseline"], 1)
    for stage in ("pretrain", "finetune"):
        assert stage_settings(plan, job, stage, runs, dtype).model.dtype == dtype
        assert stage_settings(plan, job, stage, runs).model.dtype != dtype
    named = read_plan(folder / "mini.yaml")
    first = Job(named.arms["baseline"], 1)
    assert stage_settings(named, first, "pretrain", runs, "bfloat16").model.dtype == "float32"
    given = []

    def asked(*args: Any) -> dict[str, Any]:
        given.append((args[1].name, args[-1]))
        return {"status": "failed", "error": "not here", "date": "9", "commit": ""} | {
            "preset": "mini", "arm": args[1].arm.name, "seed": args[1].seed,
        }  # fmt: skip

    results = tmp_path / "mini"
    done = {"status": "done", "settings": {"finetune": {"model": {"dtype": dtype}}}}
    write_json(results / "fastv-seed2.json", done)
    monkeypatch.setattr("proxyv.reproduce.work.run_job", asked)
    places = ["--results", str(tmp_path), "--runs", str(folder / "runs")]
    main(["run", "--preset", str(folder / "mini.yaml"), "--arms", "baseline", *places])
    assert given == [("baseline-seed1", None), ("baseline-seed2", dtype)]


def test_costs_of_all_arms_are_shares_of_one_baseline(tmp_path: Path) -> None:
    plan, row = find_plan("tiny"), RowTokens(5, 50)
    found = {}
    for arm in plan.arms.values():
        # TokenPacker has a projector of its own, which says how many tokens there are.
        if arm.checkpoint is None and "projector" not in arm.model:
            config = build_on_meta(plan.stage(Job(arm, 1), "pretrain", tmp_path)).config
            found[arm.name] = decoder_flops(baseline_config(config), row, True, True)
    assert {"baseline", "released", "positions", "nonspatial-early", "atn-early"} <= set(found)
    assert set(found.values()) == {found["baseline"]}


@pytest.mark.parametrize("began", ["float32", "bfloat16", None])
def test_a_type_that_is_slow_here_is_said_before_training(
    began: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else hours pass before anybody asks why; trained already, it no longer matters."""
    monkeypatch.setattr("proxyv.train.build._multiplies_bfloat16", lambda: False)

    def trainer(*_: Any) -> None:
        raise ValueError("here training would begin")

    monkeypatch.setattr("proxyv.reproduce.work.train_job", trainer)
    plan, said = find_plan("tiny"), []
    job = Job(plan.arms["baseline"], 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="training would begin"):
            run_job(plan, job, tmp_path, tmp_path, said.append, began)
        write_json(tmp_path / job.name / "finetune" / "finished.json", {})
    slow = "in bfloat16 as the other arms of seed 1 are, though this machine multiplies float32"
    assert [slow in line for line in said] == [True] * (began == "bfloat16")


def test_shipped_presets_are_complete() -> None:
    assert presets() == ["smol", "tiny"]
    for name in presets():
        plan = find_plan(name)
        depth = {"tiny": 8, "smol": 30}[name]
        early, late = (
            plan.arms[f"proxyv-{when}"].model["start_layer"] for when in ("early", "late")
        )
        assert (early, late) == ((12, 16) if name == "smol" else (3 * depth // 8, depth // 2))
        for share, claimed in ((early / depth, 3 / 8), (late / depth, 1 / 2)):
            assert share == claimed or any(f"{share:.2f}" in note for note in plan.notes)
        assert len(plan.seeds) >= 3 and min(plan.tasks.values()) >= 1000
        assert [job.name for job in plan.jobs()][:2] == ["baseline-seed1", "proxyv-early-seed1"]
        assert {arm.tier for arm in plan.arms.values()} == {1, 2, 3}
        for job in plan.jobs():
            if job.arm.checkpoint is None:
                settings = plan.stage(job, "finetune", Path("runs"))
                long = job.arm.name.endswith("-long")
                of = "baseline" if job.arm.name.endswith("-trained") else job.arm.name
                earlier = f"{of.removesuffix('-long')}-seed{job.seed}"
                assert settings.model.init_from == f"runs/{earlier}/pretrain"
                first = plan.stage(plan.trainer(job, "pretrain"), "pretrain", Path("runs"))
                assert first.run.output_dir == settings.model.init_from
                epochs = {"tiny": (0.5, 1.0 + long), "smol": (2.0, 2.0 + 2.0 * long)}[name]
                assert (first.optim.epochs, settings.optim.epochs) == epochs
                assert settings.run.seed == job.seed


@pytest.mark.parametrize(("name", "depth"), [("smol", 30), ("tiny", 8)])
def test_the_curve_of_a_shipped_preset_has_a_row_for_every_start(name: str, depth: int) -> None:
    """ProxyV stands beside the baseline whose same layers are masked."""
    plan = find_plan(name)
    assert plan.curve is not None
    asked = layer_counts([float(share) for share in plan.curve.split(",")], depth)
    for arm in plan.arms.values():
        if arm.model.keys() == {"start_layer"} and arm.model["start_layer"] is not None:
            assert depth - arm.model["start_layer"] in asked, arm.name


@pytest.mark.parametrize("name", presets())
def test_a_shipped_preset_trains_for_what_it_asks_on_dense_pages_of_five_crops(name: str) -> None:
    plan = find_plan(name)
    world, data = plan.world, plan.stage(plan.jobs()[0], "finetune", Path("runs")).data
    assert world["train_further"] >= 1000
    side_px = world.get("side_px", 168)
    sizes = Sizes(side_px, world.get("dense_px", 2 * side_px), most=5)
    for kind, crops in {"scene": None, "word": None, "infographic": 5, "page": 5}.items():
        for index in range(5):
            row = draw_row((1, index), kind, sizes)
            width, height = Image.open(io.BytesIO(row.png)).size
            pinpoints = data.image_grid_pinpoints
            cut = crop_layout((height, width), data.image_aspect_ratio, pinpoints, 168)
            if crops is not None:
                assert cut.num_crops == crops
            tiles = [168 * max(1, count) for count in cut.grid_hw]
            assert tiles == [height, width]  # neither enlarged nor shrunk
            # No text has more tokens than characters.
            for texts in (row.turns, [("Read the page.", row.caption)]):
                written = sum(len(text) + 16 for turn in texts for text in turn)
                assert cut.num_crops * 145 + written <= data.max_length, kind


@pytest.mark.parametrize("name", presets())
def test_every_arm_of_a_shipped_preset_is_a_model(name: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = find_plan(name)
    configs: dict[str, Any] = {}
    for arm in plan.arms.values():
        if arm.checkpoint is None:
            settings = plan.stage(Job(arm, plan.seeds[0]), "pretrain", Path("runs"))
            configs[arm.name] = build_on_meta(settings).config
        else:
            source = configs[arm.checkpoint]
            configs[arm.name] = with_start(source, source.start_layer, reduction=arm.reduction)
    counts = {arm: paper_flops(config, RowTokens(5, 50)) for arm, config in configs.items()}
    saved = {arm: 100 * (1 - count / counts["baseline"]) for arm, count in counts.items()}
    # The paper's figures; a small model with a large share of attention is a few points off.
    stated = {"proxyv-early": 46, "proxyv-late": 36, "visionzip": 32, "pyramiddrop": 42}
    for arm, percent in stated.items():
        assert saved[arm] == pytest.approx(percent, abs=5), arm
    assert saved["visionzip-nonspatial"] == pytest.approx(62, abs=2)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tier: 2", "tier: 7", "tier 7"),
        ("checkpoint: baseline", "checkpoint: baselin", "did you mean 'baseline'"),
        ("method: fastv", "method: fasttv", "arm fastv: unknown reduction.method 'fasttv'"),
        ("method: pyramiddrop", "method: pyramiddrp", "arm dropping: unknown reduction.method"),
        ("batch_size", "batchsize", "did you mean 'batch_size'"),
        ("answer_tokens: {docvqa", "answer_tokens: {docvq", "did you mean 'docvqa'"),
        ("tasks: {docvqa: 4", "tasks: {docvq: 4", "did you mean 'docvqa'"),
        (
            "tasks: {docvqa: 4",
            "curve: 0,1\ntasks: {docvqa: 3",
            "asks [3, 4] of ['docvqa', 'chartqa']",
        ),
        ("tasks: {docvqa: 4", "tasks: {mme: 4, docvqa: 4", "tasks names mme, whose mme_perception"),
        ("4}\nscore: [", "4, mmbench: 4}\nscore: [mmbench, ", "tasks names mmbench, whose"),
        ("checkpoint: baseline, reduction", "reduction", "a reduction and no checkpoint"),
        ("checkpoint: baseline, control", "control", "a control and no checkpoint"),
        ("control: blank-images", "control: blank-image", "did you mean 'blank-images'"),
        ("finetune: {optim: {max_steps: 3}}", "finetune: {max_steps: 3}", "write it by section"),
        ("seeds: [1, 2]", "seeds: [1]\nmeasures: {ccpdf: doc_bleu}", "tasks does not ask"),
        ("seeds: [1, 2]", "seeds: [1]\ncurve: 0,1\nmeasures: {docvqa: x}", "redundancy curve"),
        ("pretrained: baseline", "pretrained: baselin", "did you mean 'baseline'"),
        ("pretrained: baseline", "pretrained: baseline, against: baselin", "against: unknown arm"),
        ("seeds: [1, 2]", "seeds: [1, 2]\nlater_seeds: [2, 3]", "later_seeds has seeds [3]"),
        ("pretrained: baseline", "pretrained: baseline, seeds: [4]", "seeds [4], of [1, 2]"),
        ("seeds: [1, 2]", "seeds: [1, 2]\nlater_seeds: 1", "later_seeds has seeds 1; write a list"),
        (
            "tier: 1, title: baseline",
            "tier: 1, seeds: [2], title: baseline",
            "baseline with seeds [1]",
        ),
        ("pretrained: baseline", "pretrained: proxyv-early", "the same model settings"),
        ("pretrained: baseline", "pretrained: fastv", "which must train it itself"),
        (
            "seeds: [1, 2]",
            "seeds: [1]\n" + CLAIM.replace("fastv", "fasttv"),
            "did you mean 'fastv'",
        ),
        ("seeds: [1, 2]", "seeds: [1]\n" + CLAIM.replace("worse", "worst"), "did you mean 'worse'"),
        ("seeds: [1, 2]", "seeds: [1]\n" + CLAIM.replace("docvqa", "doc"), "unknown task 'doc'"),
        ("seeds: [1, 2]", "seeds: [1]\n" + CLAIM.replace("rule", "role"), "claim 1"),
    ],
)
def test_mistakes_in_a_preset_are_named(
    tmp_path: Path, old: str, new: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(PLAN.format(folder=tmp_path).replace(old, new))
    assert run_command(main, ["status", "--preset", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_arms_are_chosen_by_name_tier_and_seed(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text(PLAN.format(folder=tmp_path))
    plan = read_plan(tmp_path / "mini.yaml")
    assert [job.name for job in choose(plan, [2, 3], None, None)] == [
        *("fastv-seed1", "prumerge-seed1", "blind-seed1", "wrong-seed1", "longer-seed1"),
        *("dropping-seed1", "pooling-seed1"),
    ]
    assert [job.name for job in choose(plan, [1], ["fastv"], None)] == ["fastv-seed1"]
    assert [job.name for job in choose(plan, [1], None, [2])] == [
        *("baseline-seed2", "proxyv-early-seed2")
    ]
    text = PLAN.format(folder=tmp_path).replace("seeds: [1, 2]", "seeds: [1, 2]\nlater_seeds: [2]")
    (tmp_path / "mini.yaml").write_text(text.replace("FastV,", "FastV, seeds: [1],"))
    assert [job.name for job in choose(read_plan(tmp_path / "mini.yaml"), [1, 2], None, None)] == [
        *("baseline-seed1", "proxyv-early-seed1", "baseline-seed2", "proxyv-early-seed2"),
        *("fastv-seed1", "prumerge-seed2", "blind-seed2"),
    ]
    with pytest.raises(ValueError, match=r"'fast'.*'fastv'"):
        choose(plan, [1], ["fast"], None)
    with pytest.raises(ValueError, match="seed 5: the preset has 1, 2"):
        choose(plan, [1], None, [5])
    with pytest.raises(ValueError, match="--tiers 9: there are 1, 2, 3"):
        choose(plan, [1, 9], None, None)
    with pytest.raises(ValueError, match="--seeds: the preset runs fastv with 1: name one of them"):
        choose(plan, [1], ["baseline", "fastv"], [2])


def test_what_is_left_is_told_from_what_was_done() -> None:
    def state(trains: bool, seconds: float | None) -> JobState:
        return JobState("x", 1, trains, "done", seconds, "")

    done = [state(True, 100.0), state(True, 300.0), state(False, 10.0)]
    assert left_seconds(done) == 0
    assert left_seconds([*done, state(True, None), state(False, None)]) == 210
    assert left_seconds([state(False, 10.0), state(True, None)]) is None


def test_packed_scores_come_back() -> None:
    assert pack([1.0, 0.0, 2 / 3]) == "1 0 0.666667"
    assert unpack(pack([1.0, 0.0, 2 / 3])) == pytest.approx([1, 0, 2 / 3], abs=1e-6)
