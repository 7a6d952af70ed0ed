"""What a run costs, before it runs: FLOPs of a row and of a step, and memory of a GPU.

FLOPs are ``proxyv.model.flops.run_flops`` with attention as S x S (so a little more than a causal
kernel does), guided updates unfolded, logits of supervised tokens alone. Memory is an estimate for
planning that has not been compared with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxyv.model.flops import RowTokens, run_flops
from proxyv.model.head import LOGITS_AT_ONCE
from proxyv.train.settings import Settings
from proxyv.train.stages import PartCount

__all__ = [
    "PEAK_FLOPS",
    "Memory",
    "RowShape",
    "peak_flops",
    "row_flops",
    "step_memory",
    "trained_parts",
]

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOPs a second by a part of the device's name, from the makers' data sheets."""

_GIB = 1 << 30
_CONTEXT_BYTES = int(1.5 * _GIB)  # CUDA context, kernels, fragmentation


def peak_flops(device_name: str) -> float | None:
    """FLOPs a second that a GPU can do at best; None where the table does not know it."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


@dataclass(frozen=True)
class RowShape:
    """Size of a row.

    Attributes:
        crops: of all its images.
        text: tokens that are not of images.
        supervised: tokens with a label.
    """

    crops: int
    text: int
    supervised: int


def row_flops(config: Any, row: RowShape, trained: set[str] | None = None) -> dict[str, float]:
    """FLOPs of a row, by part.

    Args:
        config: a ``ProxyVConfig``.
        row: its size.
        trained: parts that train: a forward pass and its backward pass are counted; None counts
            the forward pass alone.

    Returns:
        FLOPs of "vision_tower", "projector", "language_model", "proxyv" and "lm_head". A frozen
        part costs 1 forward and, where gradients pass through it, 1 backward; a trained one 3.
    """
    forward: dict[str, float] = dict(
        run_flops(config, RowTokens(row.crops, row.text), head_rows=row.supervised)
    )
    if trained is None:
        return forward
    passes = {"vision_tower": 1} | {
        part: 2 + (part in trained) for part in forward if part != "vision_tower"
    }
    return {part: flops * passes[part] for part, flops in forward.items()}


def trained_parts(parts: list[PartCount]) -> set[str]:
    """Parts whose weights mostly train; adapters on a frozen part cost next to nothing."""
    return {part.part for part in parts if 2 * part.trainable > part.total}


def _layer_weights(config: Any) -> int:
    """Weights of the projections and the FFN of an ordinary layer."""
    text = config.text_config
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads)
    return text.hidden_size * (heads * config.head_width + 3 * text.intermediate_size)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All, with what CUDA itself takes."""
        return self.weights + self.gradients + self.optimizer + self.activations + _CONTEXT_BYTES

    def line(self) -> str:
        """In words."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "activations": self.activations,
        }
        listed = ", ".join(f"{name} {value / _GIB:.1f}" for name, value in parts.items())
        return f"about {self.total / _GIB:.1f} GiB a GPU ({listed})"


def step_memory(
    config: Any,
    settings: Settings,
    parts: list[PartCount],
    zero: dict[str, Any],
    ranks: int,
    crops: int,
) -> Memory:
    """Estimate what a step needs on each GPU, for rows as long as allowed.

    Args:
        config: a ``ProxyVConfig``.
        settings: of the run.
        parts: parameters by part.
        zero: ``zero_optimization`` of the DeepSpeed file; empty without DeepSpeed.
        ranks: GPUs.
        crops: of a row.
    """
    stage = zero.get("stage", 0)
    total, trainable = (sum(getattr(p, key) for p in parts) for key in ("total", "trainable"))
    language = next(p for p in parts if p.part == "language_model")
    shard = [ranks if stage >= needed else 1 for needed in (3, 2, 1)]
    offloaded = {
        key: zero.get(f"offload_{key}", {}).get("device", "none") != "none"
        for key in ("param", "optimizer")
    }
    if settings.model.quantize != "none":  # four bits, a float32 scale for each 64 and the rest
        small = language.total - language.trainable
        weights = 0.5625 * small + 2 * (total - small - trainable) + 4 * trainable
    else:
        weights = (2 if zero else 4) * total / shard[0]
    if stage == 3:
        gathered = 2 * 2 * _layer_weights(config)  # two layers, in two bytes
        weights = gathered + (0 if offloaded["param"] else weights)
    return Memory(
        weights=weights,
        gradients=(2 if zero else 4) * trainable / shard[1] * (not offloaded["optimizer"]),
        optimizer=(12 if zero else 8) * trainable / shard[2] * (not offloaded["optimizer"]),
        activations=_activations(config, settings, crops),
    )


def _activations(config: Any, settings: Settings, crops: int) -> float:
    """Inputs of every layer, all of one layer, the tower's features, and a chunk of logits."""
    text, micro = config.text_config, settings.optim.micro_batch
    rows, width = micro * settings.data.max_length, text.hidden_size
    query = config.head_width * text.num_attention_heads
    held = 2.0 * rows * width
    within = 2.0 * rows * (8 * width + 2 * query + 4 * text.intermediate_size)
    layers = text.num_hidden_layers
    decoder = layers * held + within
    if not settings.run.gradient_checkpointing:
        decoder = layers * within
    vision = config.vision_config
    tower = 2.0 * micro * crops * (config.side**2 + 1) * vision.hidden_size * 30
    logits = 3 * min(LOGITS_AT_ONCE, rows * text.vocab_size) * 4.0
    return decoder + tower + logits
