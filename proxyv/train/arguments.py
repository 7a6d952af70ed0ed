"""Settings as transformers' trainer and DeepSpeed take them; arithmetic of batches and steps."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from proxyv.cli import nearest
from proxyv.train.settings import Settings

__all__ = ["accumulation_steps", "deepspeed_config", "total_steps", "training_arguments"]

TRACKERS = ("wandb", "tensorboard")
"""Trackers that the trainer drives; metrics.jsonl is written by ``progress.py``."""


def accumulation_steps(settings: Settings, ranks: int) -> int:
    """Micro-batches that each rank adds up for an optimiser step.

    Raises:
        ValueError: the global batch cannot be dealt evenly to the ranks.
    """
    optim = settings.optim
    at_once = optim.micro_batch * ranks
    if optim.global_batch % at_once:
        raise ValueError(
            f"optim.global_batch={optim.global_batch} is not a multiple of optim.micro_batch="
            f"{optim.micro_batch} x {ranks} ranks = {at_once}; change one of the two"
        )
    return optim.global_batch // at_once


def total_steps(settings: Settings, rows: int, ranks: int) -> int:
    """Optimiser steps of a run over so many rows, counted as the trainer counts them.

    Raises:
        ValueError: there are so few rows that nothing is left of a pass.
    """
    optim = settings.optim
    fill = math.floor if settings.data.drop_last else math.ceil
    batches = fill(fill(rows / optim.micro_batch) / ranks)
    if not batches:
        raise ValueError(
            f"data.drop_last=true: {rows} rows fill no micro-batch of {optim.micro_batch} rows "
            f"(optim.micro_batch) on each of {ranks} ranks: set it to false, or use smaller ones"
        )
    if optim.max_steps is not None:
        return optim.max_steps
    a_pass = max(math.ceil(batches / accumulation_steps(settings, ranks)), 1)
    return max(math.ceil(optim.epochs * a_pass), 1)


def training_arguments(
    settings: Settings, output_dir: Path, rows: int, ranks: int
) -> TrainingArguments:
    """Translate settings into what transformers' trainer takes."""
    optim, run, data = settings.optim, settings.run, settings.data
    gpu = torch.cuda.is_available()
    _prepare_tracker(settings, output_dir)
    steps = total_steps(settings, rows, ranks)
    return TrainingArguments(
        output_dir=str(output_dir),
        run_name=f"{settings.model.name}-{settings.stage.name}",
        per_device_train_batch_size=optim.micro_batch,
        gradient_accumulation_steps=accumulation_steps(settings, ranks),
        num_train_epochs=optim.epochs,
        max_steps=-1 if optim.max_steps is None else optim.max_steps,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_epsilon=optim.epsilon,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type=optim.schedule
        if optim.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=math.ceil(optim.warmup_ratio * steps),
        optim="adamw_torch",
        bf16=settings.model.dtype == "bfloat16",
        deepspeed=deepspeed_config(settings),
        ddp_find_unused_parameters=False,
        use_cpu=not gpu,
        seed=run.seed,
        logging_steps=run.log_steps,
        report_to=[run.tracker] if run.tracker in TRACKERS else "none",
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 500,
        dataloader_drop_last=data.drop_last,
        dataloader_num_workers=data.workers,
        dataloader_prefetch_factor=data.prefetch if data.workers else None,
        dataloader_persistent_workers=data.workers > 0,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        disable_tqdm=True,  # progress.py shows its own
        log_level="warning",
    )


def _prepare_tracker(settings: Settings, output_dir: Path) -> None:
    """Tell the tracker where to go.

    Raises:
        ValueError: the tracker's package is not installed.
    """
    run = settings.run
    if run.tracker in TRACKERS and importlib.util.find_spec(run.tracker) is None:
        raise ValueError(
            f"run.tracker={run.tracker}: that package is not installed; pip install {run.tracker}, "
            "or use run.tracker=jsonl (metrics.jsonl in the run's folder)"
        )
    if run.tracker == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output_dir / "tensorboard"))
    if run.tracker == "wandb":
        os.environ["WANDB_MODE"] = run.wandb_mode
        os.environ["WANDB_PROJECT"] = run.project
        os.environ.setdefault("WANDB_DIR", str(output_dir))


def deepspeed_config(settings: Settings) -> dict[str, Any] | None:
    """Read the DeepSpeed file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or a file that replaces what ``optim`` says or would not let the
            weights be saved.
    """
    if settings.deepspeed.config is None:
        return None
    path = Path(settings.deepspeed.config)
    if not path.is_file():
        path = Path(__file__).resolve().parents[2] / settings.deepspeed.config
    if not path.is_file():
        folder = path.parent
        found = [
            str(Path(settings.deepspeed.config).parent / f.name) for f in folder.glob("*.json")
        ]
        raise FileNotFoundError(
            f"deepspeed.config: {nearest('file', settings.deepspeed.config, found)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed.config={settings.deepspeed.config}: {error}") from error
    _check_deepspeed(config, settings.deepspeed.config)
    return config


def _check_deepspeed(config: Any, name: str) -> None:
    """Refuse at the start what would be noticed at the end of a run, or not at all."""
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed.config={name}: it must hold a JSON object of options")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"deepspeed.config={name} has a section {section!r}, which would take the place "
                "of the learning rates and the schedule of optim.*: remove it from the file"
            )
    zero = config.get("zero_optimization", {})
    gather = "gather_16bit_weights_on_model_save"
    spellings = (f"stage3_{gather}", gather)  # DeepSpeed takes both, LLaVA's files have either
    if zero.get("stage") == 3 and not any(zero.get(name) is True for name in spellings):
        raise ValueError(
            f"deepspeed.config={name}: stage 3 shards the weights, which could not be saved in "
            f"the end: set zero_optimization.stage3_{gather} to true"
        )
