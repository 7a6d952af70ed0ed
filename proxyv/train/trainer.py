"""The trainer: transformers' own, with parameter groups by part and counts of tokens.

Nothing is patched: the subclass overrides what ``Trainer`` offers for that, and DeepSpeed is
driven by ``TrainingArguments`` on a CPU as on GPUs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from proxyv.cli import nearest
from proxyv.data.templates import IGNORE_INDEX
from proxyv.train.settings import Settings
from proxyv.train.stages import parameter_groups

__all__ = ["ProxyVTrainer", "accumulation_steps", "total_steps", "training_arguments"]


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
    """Optimiser steps of a run over so many rows, counted as the trainer counts them."""
    optim = settings.optim
    if optim.max_steps is not None:
        return optim.max_steps
    fill = math.floor if settings.data.drop_last else math.ceil
    batches = fill(fill(rows / optim.micro_batch) / ranks)
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
        deepspeed=_deepspeed_config(settings),
        ddp_find_unused_parameters=False,
        use_cpu=not gpu,
        seed=run.seed,
        logging_steps=run.log_steps,
        report_to="none" if run.tracker == "none" else [run.tracker],
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 500,
        save_total_limit=run.keep_checkpoints,
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
    """Tell wandb where to go.

    Raises:
        ValueError: the tracker's package is not installed.
    """
    run = settings.run
    if run.tracker != "none" and importlib.util.find_spec(run.tracker) is None:
        raise ValueError(
            f"run.tracker={run.tracker}: that package is not installed; pip install {run.tracker}, "
            "or leave run.tracker=none (metrics.jsonl is written in any case)"
        )
    if run.tracker == "wandb":
        os.environ["WANDB_MODE"] = run.wandb_mode
        os.environ["WANDB_PROJECT"] = run.project
        os.environ.setdefault("WANDB_DIR", str(output_dir))


def _deepspeed_config(settings: Settings) -> dict[str, Any] | None:
    """Read the DeepSpeed file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON.
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
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed.config={settings.deepspeed.config}: {error}") from error


class ProxyVTrainer(Trainer):
    """transformers' trainer for ProxyV models.

    Args:
        settings: of the run.
        **kwargs: passed on to ``Trainer``.
    """

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        self.settings = settings
        self._tokens = self._supervised = 0
        self._since = time.monotonic()
        super().__init__(**kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make AdamW with one group for each part and choice of weight decay."""
        if self.optimizer is None:
            optim = self.settings.optim
            trained: Any = self.model if model is None else model
            self.optimizer = torch.optim.AdamW(
                parameter_groups(trained, optim),
                betas=(optim.beta1, optim.beta2),
                eps=optim.epsilon,
                fused=torch.cuda.is_available(),
            )
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The usual loss; also counts tokens, padding not among them."""
        self._tokens += int(inputs["attention_mask"].sum())
        self._supervised += int((inputs["labels"] != IGNORE_INDEX).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the trainer's estimate does not know ProxyV layers."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add token counts and learning rates by part to what is logged."""
        if "loss" in logs:
            counts = torch.tensor([self._tokens, self._supervised], dtype=torch.float64)
            counts = self._sum_over_ranks(counts)
            now = time.monotonic()
            logs["tokens_per_second"] = round(counts[0].item() / max(now - self._since, 1e-9), 1)
            logs["supervised_share"] = round(counts[1].item() / max(counts[0].item(), 1.0), 4)
            for name, rate in self._rates(logs.get("learning_rate", 0.0)).items():
                logs[f"lr_{name}"] = rate
            self._tokens, self._supervised, self._since = 0, 0, now
        super().log(logs, start_time)

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return counts
        gathered: Any = self.accelerator.gather(counts.to(self.args.device)[None])
        return gathered.sum(0).cpu()

    def _rates(self, first: float) -> dict[str, float]:
        """Learning rates of the parts that train, from that of the first group.

        All follow one schedule, and the optimiser itself is already at the next step's rate.
        """
        groups = [g for g in getattr(self.optimizer, "param_groups", []) if g.get("initial_lr")]
        share = first / groups[0]["initial_lr"] if groups else 0.0
        return {group["name"]: group["initial_lr"] * share for group in groups}

    def full_state(self) -> dict[str, Tensor]:
        """Weights of the whole model on every rank's main process, gathered from shards."""
        return self.accelerator.get_state_dict(self.model_wrapped)
