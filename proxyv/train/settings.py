"""Every setting of a training run, one dataclass for each concern.

Defaults are the paper's values for Vicuna-7B; a YAML file under ``configs/`` lists what differs.
``field(metadata=...)`` carries the help text, the allowed values and the range of each setting:
``python -m proxyv.train --help`` prints them.

Source: authors' ``scripts/train`` and ``ModelArguments``/``TrainingArguments`` in ``train.py``.
Differs: the global batch is one setting, and accumulation follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from proxyv.cli import nearest
from proxyv.config import DOWNSAMPLE_MODES, LAYOUTS, PROXY_KINDS, PROXY_POSITIONS, SKIPS
from proxyv.data.pipeline import FAILURE_POLICIES
from proxyv.model.crops import ASPECT_RATIOS, PINPOINTS_HW

__all__ = [
    "DataSettings",
    "DeepSpeedSettings",
    "LoraSettings",
    "ModelSettings",
    "OptimSettings",
    "RunSettings",
    "Settings",
    "StageSettings",
    "check_settings",
    "walk",
]


_UNLIMITED = ("optim.max_grad_norm", "data.max_megapixels")
"""Settings that may be infinite: limits that then limit nothing."""


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A setting: its default, what it means, and what it may be.

    ``low`` and ``high`` are the smallest and largest value allowed. A null value always passes
    where the type allows null.
    """
    return field(default=default, metadata=_about(text, choices, low, high))


def _about(
    text: str,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    return {"help": text, "choices": choices, "low": low, "high": high}


@dataclass
class ModelSettings:
    """What is built, and from which weights."""

    name: str = option("vicuna-7b", "name of the model, used for the run's folder")
    language: str = option(
        "lmsys/vicuna-7b-v1.5",
        "language model: folder of safetensors, id on the hub, a .gguf file, or "
        "package:NAME/FILE.gguf, a file that an installed package brings",
    )
    vision: str = option(
        "openai/clip-vit-large-patch14-336", "CLIP vision tower: folder, or id on the hub"
    )
    language_config: str | None = option(
        None, "JSON config of the language model, for a dry run without its weights"
    )
    vision_config: str | None = option(
        None, "JSON config of the vision tower, for a dry run without its weights"
    )
    init_from: str | None = option(
        None,
        "folder of a finished run to start from; 'auto' is the pretrain run of the same model",
    )
    projector: str | None = option(
        None, "stage-1 file without ProxyV modules whose projector and newline a fresh model takes"
    )
    language_fields: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about("fields of the language model's configuration to set otherwise"),
    )
    quantize: str = option(
        "none",
        "how the language model's frozen matrices are held: as they are, or in 4 bits "
        "(bitsandbytes; no DeepSpeed)",
        choices=("none", "nf4"),
    )
    start_layer: int | None = option(
        12, "first ProxyV layer of the language model; null is the baseline", low=0
    )
    skip: str | None = option(
        None,
        "what vision tokens go without from start_layer on, in place of proxies, as in the "
        "redundancy study: attention (atn), or attention and FFN (atn_ffn); null is ProxyV",
        choices=SKIPS,
    )
    side_reduction: int = option(4, "factor by which a crop's side shrinks to proxies", low=1)
    proxy_kind: str = option(
        "spatial",
        "how proxies are made: downsampled crops, or learned queries",
        choices=PROXY_KINDS,
    )
    learned_proxies: int | None = option(
        None, "proxies of a crop with proxy_kind=learned; null is as many as spatial ones", low=1
    )
    downsample: str = option(
        "bilinear",
        "how spatial proxies are downsampled: bilinear without antialiasing, or block average",
        choices=DOWNSAMPLE_MODES,
    )
    proxy_positions: str = option(
        "consecutive",
        "rotary positions of proxies: counted on from their image's first token, or each the "
        "middle of its block",
        choices=PROXY_POSITIONS,
    )
    layout: str = option(
        "natural",
        "where newline tokens sit: after their crop, or as in the released weights",
        choices=LAYOUTS,
    )
    guided_ratio: float | None = option(
        None,
        "width of the guided update as a share of the model's; null is 1/4 from 1024 on, else 1/2",
        low=0.001,
        high=4.0,
    )
    vision_feature_layer: Any = field(
        default=-2,
        metadata=_about("hidden state of the vision tower that is used; tokenpacker takes a list"),
    )
    reduction: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about(
            "token reduction: method=fastv and its options, see proxyv/reduction; empty for none"
        ),
    )
    template: str = option("v1", "chat template; see proxyv/model/chat_templates.py")
    dtype: str = option(
        "bfloat16",
        "type of the computation; the optimizer updates float32 weights in any case; auto is "
        "bfloat16 where the hardware multiplies it",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = option("sdpa", "attention kernel", choices=("sdpa", "eager", "flex_attention"))


@dataclass
class DataSettings:
    """Which rows are read, and how they become tensors."""

    annotations: str = option(
        "data/sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json",
        "conversations: .json, .jsonl, .parquet, a folder of parquet files, a .yaml mixture, or an "
        "id on the hub",
    )
    images: str | None = option(
        "data/sharegpt4v", "folder that image paths are relative to; null for parquet with bytes"
    )
    image_aspect_ratio: str = option(
        "pad", "one square crop (pad) or a thumbnail and tiles (anyres)", choices=ASPECT_RATIOS
    )
    image_grid_pinpoints: list[list[int]] = field(
        default_factory=lambda: [list(pair) for pair in PINPOINTS_HW],
        metadata=_about("tile grids for anyres, each [height, width] in pixels, best first"),
    )
    max_length: int = option(2048, "longest row in tokens, images included", low=16)
    max_megapixels: float = option(100.0, "an image with more pixels is refused", low=0.001)
    follow_links: bool = option(
        False, "whether a symbolic link in the image folder may lead out of it"
    )
    expected_rows: int | None = option(
        None, "rows that the set should have: for a dry run without it, and to tell when some miss"
    )
    streaming: bool = option(
        False,
        "read parquet where it lies, on the hub or on a disk, without a copy in the cache; JSON "
        "always is",
    )
    limit: int | None = option(None, "use only the first rows; null uses all", low=1)
    group_by_length: bool = option(
        False, "rows of like length, and of one kind (with images or text alone), in a batch"
    )
    drop_last: bool = option(False, "leave out the last rows of a pass that fill no micro-batch")
    check_rows: int = option(
        2000, "rows looked at before training, evenly spaced over the set", low=0
    )
    max_unsupervised_share: float = option(
        0.01, "largest share of rows allowed to have no supervised token", low=0.0, high=1.0
    )
    on_failure: str = option(
        "raise",
        "what a row that cannot be used does: stop the run, or be left out, counted and listed in "
        "failures.txt",
        choices=FAILURE_POLICIES,
    )
    workers: int = option(4, "data-loading processes of each rank; 0 loads in the rank", low=0)
    prefetch: int = option(4, "batches that each worker keeps ready", low=1)


@dataclass
class OptimSettings:
    """Batch, length and optimiser (AdamW)."""

    global_batch: int = option(512, "rows of an optimiser step over all ranks", low=1)
    micro_batch: int = option(16, "rows of one rank at a time", low=1)
    epochs: float = option(1.0, "passes over the data", low=1e-6)
    max_steps: int | None = option(None, "stop after this many steps; null uses epochs", low=1)
    lr: float = option(1e-3, "learning rate of every part without its own", low=0.0)
    projector_lr: float | None = option(
        None, "learning rate of projector and newline; null uses lr", low=0.0
    )
    proxyv_lr: float | None = option(
        None, "learning rate of the ProxyV modules; null uses lr", low=0.0
    )
    language_lr: float | None = option(
        None, "learning rate of the language model and its head; null uses lr", low=0.0
    )
    weight_decay: float = option(0.0, "decay of matrices (never of norms and biases)", low=0.0)
    schedule: str = option(
        "cosine", "course of the learning rate", choices=("cosine", "linear", "constant")
    )
    warmup_ratio: float = option(
        0.03, "share of the steps in which the learning rate rises", low=0.0, high=1.0
    )
    beta1: float = option(0.9, "AdamW: decay of the first moment", low=0.0, high=0.9999)
    beta2: float = option(0.999, "AdamW: decay of the second moment", low=0.0, high=0.99999)
    epsilon: float = option(1e-8, "AdamW: added to the denominator", low=0.0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", low=0.0)


@dataclass
class LoraSettings:
    """Adapters on the language model in place of its own weights (stage 2)."""

    rank: int | None = option(None, "rank of the adapters; null trains the weights", low=1)
    alpha: float = option(128.0, "adapters are scaled by alpha / rank", low=0.0)
    dropout: float = option(0.0, "dropout before the adapters", low=0.0, high=0.99)


@dataclass
class StageSettings:
    """Which stage of training this is."""

    name: str = option(
        "pretrain",
        "what trains: pretrain (projector, newline, ProxyV) or finetune (the LLM too)",
        choices=("pretrain", "finetune"),
    )


@dataclass
class RunSettings:
    """Where the run goes and how it reports."""

    output_dir: str | None = option(
        None, "folder of the run; null is runs/MODEL/STAGE (MODEL-baseline without ProxyV)"
    )
    overwrite: bool = option(False, "whether a finished run in that folder may be replaced")
    seed: int = option(42, "seed of new weights and of the order of rows", low=0)
    log_steps: int = option(1, "steps between two log entries", low=1)
    save_steps: int = option(
        0, "steps between two checkpoints; 0 makes none, but for SIGTERM", low=0
    )
    keep_checkpoints: int = option(1, "complete checkpoints kept while training", low=1)
    resume: bool = option(
        True, "go on from the last complete checkpoint in the folder, if any; false begins anew"
    )
    max_skipped_steps: int = option(
        10, "stop after so many steps in a row whose loss or gradient is not finite", low=1
    )
    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass: less memory, more time"
    )
    tracker: str = option(
        "jsonl",
        "where metrics go: nowhere, metrics.jsonl in the run's folder, or also to a tracker",
        choices=("none", "jsonl", "wandb", "tensorboard"),
    )
    wandb_mode: str = option(
        "offline", "wandb keeps its files here, or sends them", choices=("offline", "online")
    )
    project: str = option("proxyv", "project name for wandb")


@dataclass
class DeepSpeedSettings:
    """How states are spread over ranks."""

    config: str | None = option(
        "configs/deepspeed/zero3.json", "DeepSpeed JSON file; null trains without DeepSpeed"
    )


@dataclass
class Settings:
    """All settings of a run, by section."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    stage: StageSettings = field(default_factory=StageSettings)
    run: RunSettings = field(default_factory=RunSettings)
    deepspeed: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)


def walk(settings: Settings) -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield ``section.name``, value and field of every setting."""
    for section in fields(settings):
        part = getattr(settings, section.name)
        for item in fields(part):
            yield f"{section.name}.{item.name}", getattr(part, item.name), item


def check_settings(settings: Settings) -> Settings:
    """Check values against what they may be, and against each other.

    Raises:
        ValueError: naming the setting, its value, what is allowed and what to do.
    """
    for key, value, item in walk(settings):
        _check_value(key, value, item)
    model, run = settings.model, settings.run
    if settings.stage.name == "finetune" and model.init_from is None:
        raise ValueError(
            "model.init_from=null with stage.name=finetune: stage 2 starts from a stage-1 run; "
            "give its folder, or 'auto' for the pretrain run of the same model"
        )
    if settings.stage.name == "pretrain" and model.init_from == "auto":
        raise ValueError(
            "model.init_from=auto with stage.name=pretrain: stage 1 has no run before it; use null "
            "to start from the backbones, or name a folder"
        )
    if settings.optim.global_batch % settings.optim.micro_batch:
        raise ValueError(
            f"optim.global_batch={settings.optim.global_batch} is not a multiple of "
            f"optim.micro_batch={settings.optim.micro_batch}"
        )
    if settings.data.streaming and settings.data.group_by_length:
        raise ValueError(
            "data.streaming=true with data.group_by_length=true: lengths are known once every row "
            "has been read; set one of the two to false"
        )
    _check_feature_layer(model.vision_feature_layer)
    _check_adapters(settings)
    if run.wandb_mode == "online" and run.tracker != "wandb":
        raise ValueError(
            f"run.wandb_mode=online with run.tracker={run.tracker}: set run.tracker=wandb too"
        )
    _check_pinpoints(settings.data)
    return settings


def _check_feature_layer(value: Any) -> None:
    layers = value if isinstance(value, list) else [value]
    if not layers or any(isinstance(n, bool) or not isinstance(n, int) for n in layers):
        raise ValueError(
            f"model.vision_feature_layer={value}: expected the number of a layer, such as -2, or a "
            "list of them"
        )


def _check_adapters(settings: Settings) -> None:
    quantized, rank = settings.model.quantize != "none", settings.lora.rank
    finetune = settings.stage.name == "finetune"
    if quantized and settings.deepspeed.config is not None:
        raise ValueError(
            f"model.quantize={settings.model.quantize} with deepspeed.config="
            f"{settings.deepspeed.config}: 4-bit weights are trained around on one GPU or with "
            "plain data parallelism; set deepspeed.config=null"
        )
    if quantized and finetune and rank is None:
        raise ValueError(
            f"model.quantize={settings.model.quantize} with stage.name=finetune and lora.rank=null:"
            " 4-bit weights do not train; set lora.rank, such as 64"
        )
    if rank is not None and not finetune:
        raise ValueError(
            f"lora.rank={rank} with stage.name={settings.stage.name}: the language model is frozen "
            "in this stage; set lora.rank=null"
        )


def _check_value(key: str, value: Any, item: Field[Any]) -> None:
    choices, low, high = (item.metadata[name] for name in ("choices", "low", "high"))
    if value is None:
        return
    if choices and value not in choices:
        raise ValueError(f"{key}: {nearest('value', str(value), map(str, choices))}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise ValueError(f"{key}={value} is out of range: it must be {limits}")
    if isinstance(value, float) and math.isinf(value) and key not in _UNLIMITED:
        raise ValueError(f"{key}={value} is out of range: it must be finite")


def _check_pinpoints(data: DataSettings) -> None:
    pinpoints = data.image_grid_pinpoints
    good = all(len(pair) == 2 and min(pair) > 0 for pair in pinpoints)
    if not good or (data.image_aspect_ratio == "anyres" and not pinpoints):
        raise ValueError(
            f"data.image_grid_pinpoints={pinpoints}: expected pairs [height, width] in pixels, at "
            "least one of them with data.image_aspect_ratio=anyres"
        )
