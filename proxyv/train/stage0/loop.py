"""The training loop that both halves of stage 0 share: optimiser, schedule, resume, log."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = [
    "Optimisers",
    "PartSettings",
    "Trainee",
    "learning_rate",
    "load_bf16",
    "run_loop",
    "save_bf16",
]

HEAD_FILE = "head.safetensors"
BETAS = (0.9, 0.95)  # of AdamW

_say = partial(print, flush=True)


@dataclass(frozen=True)
class PartSettings:
    """How a part of the tiny preset is trained; each part has its own defaults.

    Attributes:
        run: folder for state and log.
        out: where the finished part is written.
        steps: of training.
        batch: pages of a step.
        seed: of weights, pages and batches.
        ring: pages held at a time; see ``PageRing``.
        renew: pages drawn anew each step.
        workers: processes that draw pages.
        device: where it is trained.
        held: pages of each kind for measuring.
    """

    run: Path
    out: Path
    steps: int = 8000
    batch: int = 32
    seed: int = 0
    ring: int = 4000
    renew: int = 5
    workers: int = 1
    device: str = "cpu"
    held: int = 64


def learning_rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Share of the peak rate at a step: linear warm-up, plateau, linear fall to zero.

    The plateau makes a run extensible: with more steps the fall only starts later.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = steps * (1 - cooldown)
    return 1.0 if step < start else max(0.0, (steps - step) / (steps - start))


class Optimisers:
    """Muon for hidden matrices, AdamW for everything else.

    Args:
        module: what is trained.
        matrix_rate: peak rate of Muon, in AdamW's scale (``match_rms_adamw``).
        other_rate: peak rate of AdamW.
    """

    def __init__(self, module: nn.Module, matrix_rate: float, other_rate: float) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and "layers." in name
            (matrices if hidden else others).append(parameter)
        parts: list[tuple[float, torch.optim.Optimizer]] = [
            (other_rate, torch.optim.AdamW(others, lr=other_rate, weight_decay=0.0, betas=BETAS))
        ]
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=matrix_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            )
            parts.insert(0, (matrix_rate, muon))
        self.rates, self.parts = zip(*parts, strict=True)

    def step(self, share: float) -> None:
        """One step at a share of the peak rates, then clear the gradients."""
        for rate, part in zip(self.rates, self.parts, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()
            part.zero_grad(set_to_none=True)


class Trainee(nn.Module):
    """What ``run_loop`` trains: a module with a loss and a measure."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    def autocast(self) -> torch.autocast:
        """Products in bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of the step's batch, and numbers worth logging."""
        raise NotImplementedError

    def measure(self) -> dict[str, float]:
        """Scores on held-out pages."""
        raise NotImplementedError


def run_loop(
    trainee: Trainee,
    optimisers: Optimisers,
    folder: Path,
    *,
    steps: int,
    warmup: int,
    cooldown: float,
    measure_every: int,
    save_every: int,
    report: Callable[[str], None] = _say,
) -> None:
    """Train to ``steps``, resuming from ``folder`` if a state is there.

    Writes ``state.pt`` (weights, optimisers, step; replaced atomically) and ``log.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file, log_file = folder / "state.pt", folder / "log.jsonl"
    step, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=trainee.device)
        trainee.load_state_dict(state["trainee"])
        for part, saved in zip(optimisers.parts, state["optimisers"], strict=True):
            part.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]
        report(f"resuming at step {step}")
    began = time.monotonic() - spent
    mean = 0.0
    while step < steps:
        loss, numbers = trainee.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimisers.step(learning_rate(step, steps, warmup, cooldown))
        mean = loss.item() if not mean else 0.98 * mean + 0.02 * loss.item()
        step += 1
        due = step % measure_every == 0 or step == steps
        if step % 50 == 0 or due:
            row = {"step": step, "seconds": round(time.monotonic() - began), "loss": mean}
            row |= numbers
            if due:
                trainee.eval()
                with torch.no_grad():
                    row |= trainee.measure()
                trainee.train()
            report(" ".join(f"{k} {v:.4g}" for k, v in row.items()))
            with log_file.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if step % save_every == 0 or step == steps:
            state = {
                "trainee": trainee.state_dict(),
                "optimisers": [part.state_dict() for part in optimisers.parts],
                "step": step,
                "seconds": time.monotonic() - began,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)


def save_bf16(trainee: nn.Module, backbone: str, folder: Path) -> None:
    """Save a trained backbone as a transformers folder in bfloat16, its head beside it.

    The head (``head.safetensors``) is of no use but to train on from the folder; see ``load_bf16``.

    Args:
        trainee: what was trained.
        backbone: the attribute of ``trainee`` that holds the transformers model.
        folder: where to write.

    Raises:
        ValueError: a weight is not finite.
    """
    state = {name: value.to(torch.bfloat16) for name, value in trainee.state_dict().items()}
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise ValueError(f"{folder}: weights hold values that are not finite; nothing was saved")
    prefix = f"{backbone}."
    copy.deepcopy(getattr(trainee, backbone)).to(torch.bfloat16).save_pretrained(folder)
    head = {n: v.contiguous() for n, v in state.items() if not n.startswith(prefix)}
    save_file(head, folder / HEAD_FILE)


def load_bf16(trainee: nn.Module, backbone: str, folder: Path) -> None:
    """Start a trainee from a folder that ``save_bf16`` wrote.

    Raises:
        ValueError: the folder does not hold exactly the weights of the trainee.
    """
    model = getattr(trainee, backbone)
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    head = load_file(folder / HEAD_FILE)
    wanted = {n for n in trainee.state_dict() if not n.startswith(f"{backbone}.")}
    if wanted != set(head):
        raise ValueError(
            f"{folder / HEAD_FILE}: missing {sorted(wanted - set(head))}, unexpected "
            f"{sorted(set(head) - wanted)}; train from scratch or name another folder"
        )
    trainee.load_state_dict(head, strict=False)
