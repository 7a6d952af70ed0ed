"""What two gloo ranks do in one job, for test_train.py: started by torchrun, once for all of it.

    torchrun --standalone --nproc-per-node 2 tests/two_ranks.py FOLDER [--all]

Every run is small; FOLDER holds backbones and rows. A run that is stopped is told to by SIGTERM on
the second rank alone, and is then started again.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from small_training import overrides
from test_resume import At
from transformers import TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from proxyv.train import run
from proxyv.train.build import build
from proxyv.train.config_files import load_settings
from proxyv.train.launch import prepare_rank
from proxyv.train.settings import DeepSpeedSettings, Settings
from proxyv.train.signals import Interrupted

ROOT = Path(__file__).resolve().parents[1]
RANK = int(os.environ.get("RANK", "0"))
SHORT = {"optim.warmup_ratio": 0, "model.dtype": "float32", "optim.micro_batch": 1}


def settings_for(world: Path, name: str, stage: str, zero: str, **more: object) -> Settings:
    values = {
        **SHORT,
        "optim.max_steps": 2,
        "run.output_dir": world / name,
        "deepspeed.config": f"configs/deepspeed/{zero}.json",
        **more,
    }
    return load_settings(ROOT / f"configs/tiny/{stage}.yaml", overrides(world, **values))


def train(settings: Settings, callback: TrainerCallback | None = None) -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    progress = run.Progress
    if callback is not None:
        run.Progress = lambda: callback
    try:
        run.train(settings)
    finally:
        run.Progress = progress


def stop_and_go_on(settings: Settings) -> None:
    """Stopped after step 1 by the second rank, and started again."""
    told = At(1, lambda: os.kill(os.getpid(), signal.SIGTERM) if RANK == 1 else None)
    try:
        train(settings, told)
    except Interrupted as stopped:
        print(f"rank {RANK}: {stopped}", flush=True)
    else:
        raise AssertionError("the run was not stopped")
    train(settings)


def build_in_shares(settings: Settings) -> None:
    """Each rank holds its share of every parameter; together they are those of one process."""
    import deepspeed

    set_seed(settings.run.seed)
    whole = build(replace(settings, deepspeed=DeepSpeedSettings(config=None))).model
    drawn = torch.rand(3)
    set_seed(settings.run.seed)
    shared = build(settings).model
    assert torch.equal(torch.rand(3), drawn), "another rank draws something else from here on"
    parameters, expected = dict(shared.named_parameters()), dict(whole.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert (
            parameter.numel() == 0 and parameter.ds_tensor.numel() <= expected[name].numel() / 2 + 1
        )
        assert parameter.requires_grad == expected[name].requires_grad, name
        with deepspeed.zero.GatheredParameters(parameter):
            assert torch.equal(parameter, expected[name]), name
    buffers, expected = dict(shared.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in buffers.items())


def refuse_in_shares(settings: Settings) -> None:
    """What the first rank finds wrong, every rank says."""
    try:
        build(settings)
    except ValueError as error:
        assert "start_layer" in str(error), error
    else:
        raise AssertionError("another start layer was taken")


def main(world: Path, everything: bool) -> None:
    os.chdir(ROOT)
    first = settings_for(world, "pretrain", "pretrain", "zero2")
    prepare_rank(first)
    train(first)
    start = {"model.init_from": world / "pretrain"}
    build_in_shares(settings_for(world, "unused", "pretrain", "zero3"))
    build_in_shares(settings_for(world, "unused", "finetune", "zero3", **start))
    other = {**start, "model.start_layer": 2}
    refuse_in_shares(settings_for(world, "unused", "finetune", "zero3", **other))
    train(settings_for(world, "finetune", "finetune", "zero2", **start))
    stop_and_go_on(settings_for(world, "stopped-zero2", "finetune", "zero2", **start))
    stop_and_go_on(settings_for(world, "stopped-zero3", "finetune", "zero3", **start))
    broken = {"model.language": world / "broken-language", "optim.max_steps": 3}
    train(settings_for(world, "broken", "pretrain", "zero2", **broken))
    if not everything:
        return
    stop_and_go_on(settings_for(world, "pretrain-zero3", "pretrain", "zero3"))
    lora = {**start, "lora.rank": 4, "optim.lr": 1e-2}
    train(settings_for(world, "lora-zero2", "finetune", "zero2", **lora))
    train(settings_for(world, "lora-zero3", "finetune", "zero3", **lora))
    train(settings_for(world, "zero1", "finetune", "zero1", **start))
    train(settings_for(world, "offload-zero2", "finetune", "zero2-offload", **start))
    train(settings_for(world, "offload-zero3", "finetune", "zero3-offload", **start))


if __name__ == "__main__":
    main(Path(sys.argv[1]), everything="--all" in sys.argv)
