"""What trains at each stage, and with which learning rate.

One table says it; what the model itself has frozen (the last guided update, which no later layer
reads) stays frozen. Source: ``--mm_tunable_parts`` and ``create_optimizer`` of the authors.
Differs: the ProxyV modules may keep their own learning rate in stage 2 as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from proxyv.model.parts import parameter_part
from proxyv.train.adapters import has_adapters
from proxyv.train.settings import OptimSettings

__all__ = [
    "PARTS",
    "STAGES",
    "PartCount",
    "apply_stage",
    "count_parts",
    "learning_rates",
    "parameter_groups",
]

PARTS = ("vision_tower", "projector", "newline", "proxyv", "language_model", "lm_head")
"""Parts of a model, in the order of its forward pass."""

STAGES: dict[str, tuple[str, ...]] = {
    "pretrain": ("projector", "newline", "proxyv"),
    "finetune": ("projector", "newline", "proxyv", "language_model", "lm_head"),
}
"""The parts that train at each stage."""


@dataclass(frozen=True)
class PartCount:
    """Parameters of a part, and how many of them train."""

    part: str
    total: int
    trainable: int


def apply_stage(model: nn.Module, stage: str, adapters: bool = False) -> None:
    """Freeze every parameter that the stage does not train.

    Args:
        model: the model.
        stage: a key of :data:`STAGES`.
        adapters: of the language model and its head, only adapters train.
    """
    for name, parameter in model.named_parameters():
        part = parameter_part(name)
        replaced = adapters and part in ("language_model", "lm_head") and not has_adapters(name)
        if part not in STAGES[stage] or replaced:
            parameter.requires_grad_(False)


def count_parts(model: nn.Module) -> list[PartCount]:
    """Count parameters by part; works on the meta device and for shards of ZeRO-3 alike."""
    total, trainable = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total[parameter_part(name)] += size
        trainable[parameter_part(name)] += size * parameter.requires_grad
    return [PartCount(part, total[part], trainable[part]) for part in PARTS]


def learning_rates(optim: OptimSettings) -> dict[str, float]:
    """Learning rate of every part.

    Differs: learned queries of proxies and their key projection go with ``proxyv_lr``; the rate
    that the authors had for them is commented out, so they trained at ``lr``.
    """
    rates = dict.fromkeys(PARTS, optim.lr)
    if optim.projector_lr is not None:
        rates["projector"] = rates["newline"] = optim.projector_lr
    if optim.language_lr is not None:
        rates["language_model"] = rates["lm_head"] = optim.language_lr
    if optim.proxyv_lr is not None:
        rates["proxyv"] = optim.proxyv_lr
    return rates


def parameter_groups(model: nn.Module, optim: OptimSettings) -> list[dict[str, Any]]:
    """Make optimiser groups, one for each part and each choice of weight decay.

    Matrices decay; norms, biases and the newline token (everything with fewer than two
    dimensions) do not.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name`` (the part).
    """
    rates = learning_rates(optim)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parameter_part(name)
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "lr": rates[part],
                "weight_decay": optim.weight_decay if decays else 0.0,
                "name": part,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
