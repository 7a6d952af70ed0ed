"""Training for real: two stages on two CPU ranks with DeepSpeed, an overfit, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_training import break_token, make_backbones, make_rows, overrides
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed

from proxyv.cli import run_command
from proxyv.data.images import DataError
from proxyv.data.templates import template_of
from proxyv.train import run
from proxyv.train.__main__ import main
from proxyv.train.build import build, resolve, starting_folder
from proxyv.train.config_files import load_settings
from proxyv.train.settings import OptimSettings, Settings
from proxyv.train.stages import (
    STAGES,
    apply_stage,
    count_parts,
    learning_rates,
    parameter_groups,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_backbones(folder)
    make_rows(folder, 8, text_only=4)
    break_token(folder, "~")
    return folder


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


SHORT = {"optim.max_steps": 2, "optim.warmup_ratio": 0, "model.dtype": "float32"}


def settings_for(world: Path, stage: str = "pretrain", **more: object) -> Settings:
    return load_settings(ROOT / f"configs/tiny/{stage}.yaml", overrides(world, **more))


def command(world: Path, stage: str, ranks: int, **more: object) -> subprocess.CompletedProcess:
    words = ["--config", f"configs/tiny/{stage}.yaml", "--nproc", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "proxyv.train", *words, *overrides(world, **more)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def moved(before: dict, after: dict) -> set[str]:
    """Top names of the parameters that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name].float(), after[name].float())}


def two_ranks(world: Path, *arguments: str) -> str:
    """Run the job of two gloo ranks; its output."""
    words = ["--standalone", "--nproc-per-node", "2", "tests/two_ranks.py", str(world), *arguments]
    path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def two_stages(world) -> dict[str, Path]:
    """Both stages, two steps each, with ZeRO-2 and text-only rows among them, and more runs."""
    (world / "job.out").write_text(two_ranks(world))
    return {stage: world / stage for stage in STAGES}


@pytest.fixture(scope="module")
def every_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("every")
    make_backbones(folder)
    make_rows(folder, 8, text_only=4)
    break_token(folder, "~")
    two_ranks(folder, "--all")
    return folder


def test_a_run_says_what_it_does(two_stages, world):
    text = (world / "job.out").read_text().partition("done in")[0]
    assert "batch 4 = 2 ranks x 1 rows x 2 accumulated; 2 steps" in text
    assert "vision_tower" in text and "frozen" in text
    assert "tokens/s" in text and "% supervised" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("stage", list(STAGES))
def test_metrics_and_settings_lie_beside_the_run(two_stages, stage):
    folder = two_stages[stage]
    entries = metrics(folder)
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry in entries:
        assert entry["tokens_per_second"] > 0 and entry["tflops_per_second"] > 0
        parts = [value for key, value in entry.items() if key.startswith("grad_norm_")]
        assert len(parts) == (5 if stage == "finetune" else 3)
        assert sum(norm**2 for norm in parts) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-3)
        assert entry["skipped_steps"] == entry["failed_rows"] == 0
        assert 0 < entry["supervised_share"] < 1
        assert entry["lr_proxyv"] > 0
    settings = load_settings(folder / "run.yaml")
    assert settings.stage.name == stage
    assert settings.model.dtype in ("float32", "bfloat16")
    summary = json.loads((folder / "finished.json").read_text())
    assert (summary["steps"], summary["template"]) == (2, "tiny")


def test_a_stage_trains_its_parts_and_no_other(two_stages, world):
    set_seed(42)
    fresh = build(settings_for(world, **SHORT)).model.state_dict()
    stages = {
        stage: AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        for stage, folder in two_stages.items()
    }
    first = moved(fresh, stages["pretrain"])
    assert {name.split(".")[1] for name in first} == {
        "image_newline",
        "multi_modal_projector",
        "language_model",
    }
    assert all("guided_update" in name for name in first if ".language_model." in name)
    second = moved(stages["pretrain"], stages["finetune"])
    assert any("q_proj" in name for name in second) and "lm_head.weight" in second
    assert not any("vision_tower" in name for name in first | second)
    last = "layers.3.guided_update"
    assert not any(last in name for name in first | second)


def test_a_run_is_a_complete_model_folder(two_stages):
    folder = two_stages["finetune"]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert template_of(processor.tokenizer).name == "tiny"
    assert processor.image_aspect_ratio == "pad"
    assert model.config.start_layer == 1 and model.config.text_config.use_cache
    inputs = processor(
        images=[Image.new("RGB", (40, 30), "red")],
        text=["<s><|user|><image>\nWhich colour?<|assistant|>"],
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def in_process(monkeypatch, settings: Settings) -> Path:
    """Train in this process, without DeepSpeed and without a process group."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return run.train(settings)


def test_overfits_eight_samples(world, monkeypatch, tmp_path):
    rows = json.loads((world / "rows.json").read_text())[:8]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = settings_for(
        world,
        **{
            "data.annotations": tmp_path / "rows.json",
            "run.output_dir": tmp_path / "run",
            "run.log_steps": 10,
            "model.dtype": "float32",
            "deepspeed.config": "null",
            "optim.global_batch": 8,
            "optim.micro_batch": 8,
            "optim.max_steps": 120,
            "optim.lr": 5e-3,
            "optim.proxyv_lr": 5e-3,
        },
    )
    # everything but the tower must train, and there is no earlier run: stage 2 from scratch
    settings.stage.name = "finetune"
    folder = in_process(monkeypatch, settings)
    losses = [entry["loss"] for entry in metrics(folder)]
    assert losses[0] > 2 and losses[-1] < 0.1


def test_every_part_has_its_own_learning_rate_in_the_log(world, monkeypatch, tmp_path):
    """The projector, which stands first, rests: the others' rates are those of the schedule."""
    rates = {"optim.projector_lr": 0, "optim.lr": 1e-3, "optim.proxyv_lr": 2e-3}
    more = {"run.output_dir": tmp_path, "deepspeed.config": "null", "optim.schedule": "linear"}
    entries = metrics(in_process(monkeypatch, settings_for(world, **{**SHORT, **more, **rates})))
    assert [entry["lr_projector"] for entry in entries] == [0, 0]
    assert [entry["lr_proxyv"] for entry in entries] == pytest.approx([2e-3, 1e-3])
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([2e-3, 1e-3])


@pytest.mark.parametrize(
    ("schedule", "falling"),
    [("cosine", [1, 0.75, 0.25]), ("linear", [1, 2 / 3, 1 / 3]), ("constant", [1, 1, 1])],
)
def test_the_rate_rises_in_the_warmup_and_falls_as_the_schedule_says(
    world, monkeypatch, tmp_path, schedule, falling
):
    more = {
        "run.output_dir": tmp_path, "deepspeed.config": "null", "model.dtype": "float32",
        "optim.max_steps": 5, "optim.warmup_ratio": 0.4, "optim.proxyv_lr": 2e-3,
        "optim.schedule": schedule,
    }  # fmt: skip
    entries = metrics(in_process(monkeypatch, settings_for(world, **more)))
    assert [entry["lr_proxyv"] / 2e-3 for entry in entries] == pytest.approx([0, 0.5, *falling])


class Watch(TrainerCallback):
    """What the optimiser is, and the norm of the gradients that it gets."""

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        self.norm, self.group = float(torch.stack(grads).norm()), optimizer.param_groups[0]


def test_the_optimiser_is_what_the_settings_say(world, monkeypatch, tmp_path):
    more = {
        "run.output_dir": tmp_path, "deepspeed.config": "null", "model.dtype": "float32",
        "optim.max_steps": 1, "optim.warmup_ratio": 0, "optim.beta1": 0.8, "optim.beta2": 0.95,
        "optim.epsilon": 1e-6, "optim.max_grad_norm": 0.01,
    }  # fmt: skip
    watch, make = Watch(), run.Progress
    monkeypatch.setattr(run, "Progress", lambda: [make(), watch][1])
    folder = in_process(monkeypatch, settings_for(world, **more))
    assert (watch.group["betas"], watch.group["eps"]) == ((0.8, 0.95), 1e-6)
    assert watch.norm == pytest.approx(0.01, rel=1e-3) and metrics(folder)[0]["grad_norm"] > 0.02


def test_rates_of_the_parts():
    optim = OptimSettings(lr=1.0, projector_lr=2.0, proxyv_lr=3.0, language_lr=4.0)
    assert learning_rates(optim) == {
        "vision_tower": 1.0, "projector": 2.0, "newline": 2.0, "proxyv": 3.0,
        "language_model": 4.0, "lm_head": 4.0,
    }  # fmt: skip
    assert set(learning_rates(OptimSettings(lr=1.0)).values()) == {1.0}


def test_a_set_of_which_no_row_can_be_used_is_refused(world, monkeypatch, tmp_path):
    record = {"id": "a", "image": "images/gone.png", "conversations": SAID}
    more = {"data.on_failure": "skip", "deepspeed.config": "null"}
    for grouped in (False, True):
        given = {**broken(world, tmp_path, record), **more, "data.group_by_length": grouped}
        with pytest.raises(DataError, match="none of the 1 rows looked at can be used; the first"):
            in_process(monkeypatch, settings_for(world, **given))


def test_micro_batches_add_up_to_the_global_batch(world, monkeypatch, tmp_path):
    """Rows of different lengths: 8 x 1 = 2 x 4 = 1 x 8, in losses and weights, token-weighted.

    The last run also recomputes its activations.
    """
    losses, weights = [], []
    for micro in (8, 2, 1):
        settings = settings_for(
            world,
            **{
                **SHORT,
                "run.output_dir": tmp_path / str(micro),
                "deepspeed.config": "null",
                "optim.global_batch": 8,
                "optim.micro_batch": micro,
                "run.gradient_checkpointing": micro == 1,
            },
        )
        folder = in_process(monkeypatch, settings)
        losses.append([entry["loss"] for entry in metrics(folder)])
        weights.append(load_file(folder / "model.safetensors"))
    assert losses[0][0] != losses[0][1]
    for other, found in zip(losses[1:], weights[1:], strict=True):
        assert losses[0] == pytest.approx(other, rel=1e-4)
        for name, value in weights[0].items():
            torch.testing.assert_close(value, found[name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_ranks_with_deepspeed_do_what_one_process_does(
    two_stages, world, monkeypatch, tmp_path
):
    """ZeRO-2, accumulation and batches of text alone change nothing but where it is computed."""
    plain = {"run.output_dir": tmp_path / "run", "deepspeed.config": "null", **SHORT}
    folder = in_process(monkeypatch, settings_for(world, **plain, **{"optim.micro_batch": 4}))
    for entry, other in zip(metrics(folder), metrics(two_stages["pretrain"]), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def check_alike(one: Path, other: Path, **tolerance: float) -> None:
    """The same losses and norms, over all steps too, and the same weights after loading."""
    means = [json.loads((folder / "finished.json").read_text())["loss"] for folder in (one, other)]
    assert means[0] == pytest.approx(means[1], rel=tolerance.get("rtol", 0) or None)
    for entry, like in zip(metrics(one), metrics(other), strict=True):
        for key in ("loss", "grad_norm", "grad_norm_proxyv", "grad_norm_projector"):
            assert entry[key] == pytest.approx(like[key], rel=tolerance.get("rtol", 0) or None)
    weights, others = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (one, other)
    )
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], msg=name, **tolerance)


def test_zero2_goes_on_where_it_was_stopped(two_stages, world):
    """One rank is told to go; both save, stop, and go on as if nothing had been."""
    check_alike(world / "stopped-zero2", two_stages["finetune"], rtol=0, atol=0)
    said = (world / "job.out").read_text()
    assert said.count("stopped by signal 15 after step 1") == 4
    assert f"going on from {world / 'stopped-zero2' / 'checkpoint-1'}" in said


def test_a_step_that_is_not_finite_is_left_out_on_every_rank(two_stages, world):
    """One row of twelve gives NaN; its step changes nothing, and the run goes on."""
    entries = metrics(world / "broken")
    assert [entry["skipped_steps"] for entry in entries][-1] == 1 and len(entries) == 3
    assert (world / "job.out").read_text().count("not finite") == 1
    weights = load_file(world / "broken" / "model.safetensors")
    assert all(value.isfinite().all() for name, value in weights.items() if "embed" not in name)


def test_zero3_stopped_and_resumed_gives_the_weights_of_zero2(two_stages, world):
    check_alike(world / "stopped-zero3", two_stages["finetune"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_every_kind_of_sharding_gives_the_same_model(every_run):
    near = {"rtol": 1e-3, "atol": 1e-4}
    check_alike(every_run / "pretrain-zero3", every_run / "pretrain", **near)
    for name in ("zero1", "offload-zero2", "offload-zero3"):
        check_alike(every_run / name, every_run / "finetune", **near)
    check_alike(every_run / "lora-zero3", every_run / "lora-zero2", **near)
    assert (every_run / "lora-zero3" / "adapter" / "adapter_config.json").is_file()


def test_parts_and_groups(world):
    settings = settings_for(
        world,
        **{"optim.weight_decay": 0.1, "optim.projector_lr": 0.5, "optim.proxyv_lr": 1e-3},
    )
    model = build(resolve(settings)).model
    total = sum(parameter.numel() for parameter in model.parameters())
    apply_stage(model, "pretrain")
    counts = {part.part: part for part in count_parts(model)}
    assert sum(part.total for part in counts.values()) == total
    assert counts["language_model"].trainable == counts["vision_tower"].trainable == 0
    # layers 1, 2 and 3 have a guided update; the last one trains at no stage
    assert counts["proxyv"].trainable * 3 == counts["proxyv"].total * 2
    groups = parameter_groups(model, settings.optim)
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert trained == sum(part.trainable for part in counts.values())
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"projector": 0.5, "newline": 0.5, "proxyv": 1e-3}
    for group in groups:
        decays = all(parameter.dim() >= 2 for parameter in group["params"])
        assert group["weight_decay"] == (0.1 if decays else 0.0)


def broken(world: Path, tmp_path: Path, record: dict) -> dict[str, object]:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps([record]))
    return {"data.annotations": path, "run.output_dir": tmp_path / "run"}


SAID = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "a", "image": "images/gone.png", "conversations": SAID}, "no image file .*gone"),
        ({"id": "b", "image": "rows.json", "conversations": SAID}, "rows.json is not an image"),
        ({"id": "c", "image": "images/0.png", "conversations": SAID[:1]}, "no answer"),
        ({"id": "d", "conversations": SAID}, "1 <image> in the text, but 0 images"),
    ],
)
def test_bad_rows_stop_a_run_before_it_trains(world, tmp_path, monkeypatch, record, message):
    settings = settings_for(world, **broken(world, tmp_path, record))
    with pytest.raises(DataError, match=message) as caught:
        in_process(monkeypatch, settings)
    assert f"row 0 (id {record['id']!r})" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_pad_makes_no_square_beyond_the_limit(world, tmp_path, monkeypatch):
    Image.new("RGB", (1200, 2)).save(world / "images" / "wide.png")
    record = {"id": "w", "image": "images/wide.png", "conversations": SAID}
    given = {**broken(world, tmp_path, record), "data.max_megapixels": 1}
    for ratio, squared in (("pad", True), ("anyres", False)):
        settings = settings_for(world, **given, **{"data.image_aspect_ratio": ratio})
        [image] = run.open_data(settings)[0].images
        if squared:
            with pytest.raises(DataError, match="put on a square of 1200 x 1200"):
                in_process(monkeypatch, settings)
        else:
            assert image.load().size == (1200, 2)


def test_a_bad_row_is_one_line_and_an_exit_code(world, tmp_path):
    record = {"id": "far", "image": "images/gone.png", "conversations": SAID}
    done = command(world, "pretrain", ranks=2, **broken(world, tmp_path, record))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and "gone.png" in lines[0] and "'far'" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tinny", "--stage", "pretrain"], "unknown preset 'tinny': did you mean"),
        (["--config", "configs/tiny/pretrain.yaml", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["--config", "configs/gone.yaml"], "no config file configs/gone.yaml"),
        (
            ["--config", "configs/tiny/pretrain.yaml", "--dry-run", "model.vision=data/nowhere"],
            f"model.vision: no folder 'data/nowhere' (in {ROOT})",
        ),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, message):
    assert run_command(main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_config_file_says_its_own_stage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", "configs/tiny/pretrain.yaml", "--stage", "finetune", "--dry-run"])
    assert stopped.value.code == 2
    assert "--stage finetune goes with --preset" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named(world, monkeypatch, tmp_path):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    more = {"run.output_dir": tmp_path, "run.tracker": "tensorboard", "deepspeed.config": "null"}
    with pytest.raises(ValueError, match=r"run\.tracker=tensorboard: .* pip install tensorboard"):
        in_process(monkeypatch, settings_for(world, **more))


def test_a_finished_run_is_not_replaced(two_stages, world, monkeypatch):
    settings = settings_for(world, **{"run.output_dir": two_stages["pretrain"]})
    with pytest.raises(ValueError, match=r"holds a finished run: .*run\.overwrite=true"):
        in_process(monkeypatch, settings)
    folder = two_stages["pretrain"]
    itself = {"model.init_from": folder, "run.output_dir": folder, "run.overwrite": True}
    with pytest.raises(ValueError, match=r"also the run that this one starts from"):
        in_process(monkeypatch, settings_for(world, "finetune", **itself))
    assert (folder / "finished.json").is_file()


def test_stage_two_refuses_what_does_not_fit(two_stages, world, tmp_path):
    base = {"model.init_from": two_stages["pretrain"], "run.output_dir": tmp_path}
    other = settings_for(world, "finetune", **{**base, "model.start_layer": 2})
    with pytest.raises(ValueError, match=r"model\.start_layer=2 contradicts .*start_layer=1"):
        build(resolve(other))
    packer = {"model.reduction": {"method": "tokenpacker", "scale": 2}}  # has weights
    with pytest.raises(ValueError, match=r"model\.reduction=.*tokenpacker.* contradicts .*None"):
        build(resolve(settings_for(world, "finetune", **{**base, **packer})))
    nowhere = settings_for(world, "finetune", **{**base, "model.init_from": tmp_path / "gone"})
    with pytest.raises(FileNotFoundError, match=r"holds no finished run \(no config\.json\)"):
        starting_folder(nowhere)
    broken = tmp_path / "broken"
    shutil.copytree(two_stages["pretrain"], broken)
    (broken / "finished.json").unlink()  # as while it is trained again
    again = settings_for(world, "finetune", **{**base, "model.init_from": broken})
    with pytest.raises(FileNotFoundError, match=r"holds no finished run \(no finished\.json\)"):
        starting_folder(again)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava_next"}, r"packing: llava_next\).*start from a run"),
        ({"model_type": "proxyv", "packing": "llava_next"}, r"packing: llava_next\)"),
        ({"model_type": "llava_llama"}, r"type 'llava_llama', expected 'proxyv'"),
    ],
)
def test_models_that_are_not_trained_here_are_refused(world, tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "processor_config.json").write_text("{}")
    settings = settings_for(world, "finetune", **{"model.init_from": tmp_path})
    with pytest.raises(ValueError, match=message):
        starting_folder(settings)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_bare_script_asks_for_a_preset_where_gpus_are(stage):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run(
        ["bash", f"scripts/{stage}.sh", "optim.lr=1e-4"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    for preset in ("vicuna-7b", "tiny"):
        assert f"bash scripts/{stage}.sh {preset}\n" in done.stderr


@pytest.mark.parametrize(
    ("gpus", "arguments", "expected"),
    [
        ("", ["optim.lr=1"], "--preset tiny --stage pretrain --nproc 1 optim.lr=1"),
        ("", [], "--preset tiny --stage pretrain --nproc 1"),
        (
            "0,1",
            ["vicuna-7b", "--dry-run"],
            "--preset vicuna-7b --stage pretrain --nproc 2 --dry-run",
        ),
        ("-1", ["vicuna-7b"], "--preset vicuna-7b --stage pretrain --nproc 1"),
        ("-1", [], "--preset tiny --stage pretrain --nproc 1"),
        ("0,1,-1,2", ["vicuna-7b"], "--preset vicuna-7b --stage pretrain --nproc 2"),
        ("0,1", ["--help"], "--help"),
        ("0,1", ["tiny"], "--preset tiny --stage pretrain --nproc 1"),
        ("0,1", ["tiny-baseline"], "--preset tiny-baseline --stage pretrain --nproc 1"),
    ],
)
def test_the_script_passes_preset_ranks_and_exit_code(tmp_path, gpus, arguments, expected):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("pretrain.sh", "stage.sh"):
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "scripts" / "env.sh").write_text("ensure_env() { [ $1 = train ]; }\n")
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PATH": path}
    environment.pop("NPROC", None)
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "pretrain.sh"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == f"-m proxyv.train {expected}"
