"""The trainer: parameter groups by part, a token-weighted loss, counts, and steps left out.

Nothing is patched: the subclass overrides what ``Trainer`` offers for that, and DeepSpeed is
driven by ``TrainingArguments`` on a CPU as on GPUs.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proxyv.data.failures import FailureLog
from proxyv.data.sampler import RowSampler
from proxyv.data.templates import IGNORE_INDEX
from proxyv.train.cost import RowShape, peak_flops, row_flops, trained_parts
from proxyv.train.group_norms import GroupNorms
from proxyv.train.ranks import gather
from proxyv.train.resumable import ResumableTrainer
from proxyv.train.settings import Settings
from proxyv.train.signals import start_worker
from proxyv.train.stages import count_parts, parameter_groups

__all__ = ["ProxyVTrainer"]

_NAMED_ROWS = 20  # rows that a message about a bad step names at most


class ProxyVTrainer(ResumableTrainer):
    """transformers' trainer for ProxyV models.

    Args:
        settings: of the run.
        sampler: the order of rows.
        failures: where rows that were left out are listed.
        **kwargs: passed on to ``ResumableTrainer``.
    """

    def __init__(
        self, settings: Settings, sampler: RowSampler, failures: FailureLog, **kwargs: Any
    ) -> None:
        self.settings, self.sampler, self.failures = settings, sampler, failures
        self._tokens = self._supervised = self._failed = 0
        self._flops = 0.0
        self._rates: dict[str, float] = {}
        gpu = torch.cuda.is_available()
        self._peak = peak_flops(torch.cuda.get_device_name()) if gpu else None
        self._since = time.monotonic()
        self._step_rows: list[tuple[list[str], Tensor]] = []
        self._norms: GroupNorms | None = None
        self.skipped_steps = self._skipped_in_a_row = 0
        super().__init__(**kwargs)
        self._trained = trained_parts(count_parts(self.model))

    def _get_train_sampler(self, train_dataset: Any = None) -> RowSampler:
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """The usual loader; its workers outlive a SIGTERM to the rank's process group."""
        prepared: Any = super().get_train_dataloader()
        loader = prepared.base_dataloader  # what accelerate iterates over
        loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
        return prepared

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
            self._norms = GroupNorms(self.optimizer, self._will_log)
        return self.optimizer

    def _will_log(self) -> bool:
        return (self.state.global_step + 1) % self.settings.run.log_steps == 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The usual loss; also counts tokens, and remembers which rows the step was made of."""
        rows = inputs.pop("rows", [])
        for line in self.failures.add(inputs.pop("failures", [])):
            self._failed += 1
            print(f"left out: {line}", flush=True)
        self._count(inputs)
        inputs["loss_only"] = True
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self._step_rows.append((rows, loss.detach()))
        return result

    def _count(self, inputs: dict[str, Any]) -> None:
        """Add up tokens and FLOPs of a micro-batch; padding is none."""
        config: Any = self.model.config
        images = inputs["input_ids"] == config.image_token_index
        sizes = [inputs["attention_mask"], images, inputs["labels"] != IGNORE_INDEX]
        for tokens, of_images, supervised in torch.stack([s.sum(1) for s in sizes], 1).tolist():
            self._tokens += tokens
            self._supervised += supervised
            crops = of_images // config.rows_per_crop
            row = RowShape(crops, tokens - of_images, supervised)
            self._flops += sum(row_flops(config, row, self._trained).values())

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm before clipping; a step in which it is not finite changes nothing.

        DeepSpeed leaves such a step out by itself, in bfloat16 and at every stage of ZeRO since
        0.19.8, which is therefore the oldest one allowed. The norm is the same on every rank.

        Raises:
            ValueError: too many such steps in a row.
        """
        norm = float(super()._get_grad_norm(model, grad_norm))
        rows, self._step_rows = self._step_rows, []
        if math.isfinite(norm) and norm >= 0:
            self._skipped_in_a_row = 0
            return norm
        if not self.is_deepspeed_enabled:
            model.zero_grad()  # an optimiser without gradients changes nothing
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._report_skipped(rows)
        return norm

    def _report_skipped(self, rows: list[tuple[list[str], Tensor]]) -> None:
        bad = [row for names, loss in rows if not bool(loss.isfinite()) for row in names]
        everywhere = [row for part in gather(bad) for row in part]
        what = "loss of" if everywhere else "gradient (not the loss) of"
        if not everywhere:
            everywhere = [row for part in gather([r for n, _ in rows for r in n]) for row in part]
        named = "; ".join(everywhere[:_NAMED_ROWS])
        more = len(everywhere) - _NAMED_ROWS
        text = (
            f"step {self.state.global_step + 1}: the {what} these rows is not finite: {named}"
            + (f"; and {more} more" if more > 0 else "")
        )
        limit = self.settings.run.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            raise ValueError(
                f"{text}; {limit} steps in a row were left out (run.max_skipped_steps): lower the "
                "learning rate, or look at the rows"
            )
        if self.is_world_process_zero():
            print(f"warning: {text}; the step was left out", flush=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the trainer's estimate does not know ProxyV layers."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add token counts, learning rates and gradient norms by part to what is logged."""
        if "loss" in logs:
            own = [self._tokens, self._supervised, self._failed, self._flops]
            counts = self._sum_over_ranks(torch.tensor(own, dtype=torch.float64))
            tokens, supervised, failed, flops = counts.tolist()
            now = time.monotonic()
            seconds = max(now - self._since, 1e-9)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            logs["tflops_per_second"] = float(f"{flops / seconds / 1e12:.3g}")
            if self._peak is not None:
                logs["mfu"] = round(flops / seconds / (self._peak * self.args.world_size), 4)
            logs["supervised_share"] = round(supervised / max(tokens, 1.0), 4)
            logs["skipped_steps"] = self.skipped_steps
            logs["failed_rows"] = int(failed)
            for name, rate in self._rates.items():
                logs[f"lr_{name}"] = rate
            for name, norm in self._group_norms(logs).items():
                logs[f"grad_norm_{name}"] = norm
            self._tokens, self._supervised, self._flops, self._since = 0, 0, 0.0, now
        super().log(logs, start_time)

    def _group_norms(self, logs: dict[str, float]) -> dict[str, float]:
        if self._norms is None or not math.isfinite(logs.get("grad_norm", math.nan)):
            return {}
        sharded = self.is_deepspeed_enabled and self.args.world_size > 1
        return self._norms.before_clipping(
            logs["grad_norm"], self.args.max_grad_norm, self._sum_over_ranks if sharded else None
        )

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return counts
        gathered: Any = self.accelerator.gather(counts.to(self.args.device)[None])
        return gathered.sum(0).cpu()

    def _get_learning_rate(self) -> float:
        """The learning rate of the first part that has one.

        The trainer asks before it sets the next step's; those of all parts are noted then.
        """
        first = super()._get_learning_rate()
        groups = getattr(self.optimizer, "param_groups", [])
        self._rates = {group["name"]: float(group["lr"]) for group in groups}
        rising = (float(group["lr"]) for group in groups if group.get("initial_lr"))
        return first or next(rising, 0.0)

    def full_state(self) -> dict[str, Tensor]:
        """Weights of the whole model on every rank's main process, gathered from shards."""
        return self.accelerator.get_state_dict(self.model_wrapped)
