"""A trainer whose checkpoints hold what trains, and nothing else: parameters and optimiser.

What is frozen comes from the backbones or from the run that this one starts from, which a resumed
run reads again. So a stage-1 checkpoint of a 7 B model takes 4 GB, not 17.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from proxyv.train.checkpoints import CheckpointError, Checkpoints

__all__ = ["ResumableTrainer"]

_WEIGHTS = "trained.safetensors"
_OPTIMIZER = "optimizer.pt"
_SCHEDULER = "scheduler.pt"
_BYTES_PER_PARAMETER = 16  # weight, float32 copy and two moments, at most


class ResumableTrainer(Trainer):
    """transformers' trainer with complete-or-absent checkpoints.

    Args:
        checkpoints: where they are.
        **kwargs: passed on to ``Trainer``.
    """

    def __init__(self, checkpoints: Checkpoints, **kwargs: Any) -> None:
        self.checkpoints = checkpoints
        self.model: Any
        self.model_wrapped: Any
        self.optimizer: Any
        self.lr_scheduler: Any
        super().__init__(**kwargs)

    def trained_parameters(self) -> dict[str, Any]:
        """The parameters that train, by name."""
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called by the trainer where a checkpoint is due; every rank takes part."""
        sizes = [getattr(p, "ds_numel", p.numel()) for p in self.trained_parameters().values()]
        self.checkpoints.write(
            self.state.global_step, self._fill, needed_bytes=_BYTES_PER_PARAMETER * sum(sizes)
        )

    def _fill(self, folder: Path) -> None:
        """Write this rank's files."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)
        if self.is_world_process_zero():
            if not self.is_deepspeed_enabled:
                save_file(_on_cpu(self.trained_parameters()), folder / _WEIGHTS)
                torch.save(self.optimizer.state_dict(), folder / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / _SCHEDULER)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self._save_rng_state(str(folder))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Passes done and micro-batches done of the next one, as the trainer reads them."""
        done: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return done
        # How often to log and to save may be another now than when the checkpoint was written.
        self.state.compute_steps(self.args, max_steps)
        if self.state.global_step >= max_steps:  # only saving was left: within a pass, perhaps
            return num_train_epochs, 0
        return done

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: :meth:`_restore` reads everything at once, when all of it exists."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, folder: Path) -> None:
        """Read parameters, optimiser and schedule from a checkpoint that has been verified."""
        if self.is_deepspeed_enabled:
            loaded, _ = self.model_wrapped.load_checkpoint(str(folder), load_module_strict=False)
            if loaded is None:
                raise CheckpointError(f"DeepSpeed finds no checkpoint in {folder}")
        else:
            self._restore_weights(folder / _WEIGHTS)
            self.optimizer.load_state_dict(_load(folder / _OPTIMIZER))
        self.lr_scheduler.load_state_dict(_load(folder / _SCHEDULER))

    @torch.no_grad()
    def _restore_weights(self, path: Path) -> None:
        parameters, saved = self.trained_parameters(), load_file(path)
        if parameters.keys() != saved.keys():
            differ = sorted(parameters.keys() ^ saved.keys())
            raise CheckpointError(
                f"{path} holds other parameters than train now; the first that differ: {differ[:3]}"
            )
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def _on_cpu(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in parameters.items()}


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
