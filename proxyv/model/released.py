"""The authors' released checkpoints as folders: configuration, weights and tokenizer.

A release is a LLaVA folder: a flat ``config.json`` of type ``llava_llama``, ``llava_qwen`` or
``llava_phi`` that only names the vision tower, weights under LLaVA's names, a tokenizer without an
image token, and no image processor. It is read as ``layout: released``, because it was trained so.

Source: released checkpoints and the authors' training code (``config.json`` keys).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaNextConfig,
    PreTrainedConfig,
)

from proxyv.config import ProxyVConfig
from proxyv.model.chat_templates import TEMPLATES, add_image_token
from proxyv.model.checkpoints import check_variant, from_released
from proxyv.model.crops import crop_processor

__all__ = [
    "check_saved_variant",
    "is_release",
    "keep_learned_proxies",
    "load_weights",
    "read_release",
    "read_tokenizer",
    "read_weights",
    "release_folder",
    "release_parts",
    "released_config",
    "to_released_config",
    "weight_files",
]

_FAMILIES = {"llava_llama": "llama", "llava_phi": "phi3", "llava_qwen": "qwen2"}
_CLASSES = {
    "llama": "LlavaLlamaForCausalLM",
    "phi3": "LlavaPhiForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
_NOT_TEXT = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")
_CLIP_L_336 = "clip-vit-large-patch14-336"


def is_release(name: str | Path, **hub_options: Any) -> bool:
    """Whether a folder or hub id holds a released checkpoint, by the type in its ``config.json``.

    Raises:
        OSError: there is no such folder or model.
    """
    return _raw_config(name, hub_options).get("model_type") in _FAMILIES


def check_saved_variant(name: str | Path, options: Mapping[str, Any]) -> None:
    """Refuse options under which the ProxyV modules of a saved model would be others.

    A number may be named where it was left to follow from the rest, if it is the one that follows.
    A baseline may be loaded with any start layer: all of its ProxyV modules are new then.

    Args:
        name: folder or hub id.
        options: what ``from_pretrained`` was called with; fields of the configuration, or a whole
            ``config``, as the Auto classes hand it on.

    Raises:
        ValueError: naming the option, its value and the value that it was saved with.
    """
    raw = _raw_config(name, options)
    if raw.get("model_type") != ProxyVConfig.model_type or raw.get("start_layer") is None:
        return
    config = options.get("config")
    for option in ("start_layer", "skip", "proxy_kind", "learned_proxies", "guided_ratio"):
        found = raw.get(option, getattr(ProxyVConfig, option))
        wanted = getattr(config, option) if isinstance(config, ProxyVConfig) else found
        wanted = options.get(option, wanted)
        if wanted != found and not _same_size(raw, option, wanted):
            raise ValueError(
                f"{option}={wanted!r} does not fit the weights of {name}, which were "
                f"saved with {option}={found!r}: leave it out, or load another model"
            )


def _same_size(raw: dict[str, Any], option: str, wanted: Any) -> bool:
    """Whether modules of a saved model have the same sizes with another value of an option."""
    size = {"learned_proxies": "proxies_per_crop", "guided_ratio": "guided_width"}.get(option)
    if size is None:
        return False
    saved: Any = ProxyVConfig.from_dict(raw)
    changed = copy.deepcopy(saved)
    setattr(changed, option, wanted)
    try:
        changed.check_options()
    except ValueError:  # what no model can have, this one has not either
        return False
    return bool(getattr(changed, size) == getattr(saved, size))


def keep_learned_proxies(name: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under which a saved model has as many learned proxies as it was saved with.

    Where nothing names their number it follows from the full tokens of a crop, which a token
    reduction that the model was saved without would make fewer; the weights stay as they are.

    Args:
        name: folder or hub id.
        options: as ``check_saved_variant`` takes them.
    """
    raw, options = _raw_config(name, options), dict(options)
    if raw.get("model_type") != ProxyVConfig.model_type or raw.get("proxy_kind") != "learned":
        return options
    saved: Any = ProxyVConfig.from_dict(raw)
    config = options.get("config")
    given = config if isinstance(config, ProxyVConfig) else saved
    wanted = {
        key: options.get(key, getattr(given, key)) for key in ("reduction", "learned_proxies")
    }
    if wanted["reduction"] == saved.reduction or wanted["learned_proxies"] is not None:
        return options
    if given is saved:
        return {**options, "learned_proxies": saved.proxies_per_crop}
    changed = copy.deepcopy(given)
    changed.learned_proxies = saved.proxies_per_crop
    return {**options, "config": changed}


def release_folder(name: str | Path, **hub_options: Any) -> Path:
    """The folder of a release, downloaded from the hub where ``name`` is no folder."""
    if Path(name).is_dir():
        return Path(name)
    options: Any = _hub(hub_options)
    return Path(snapshot_download(str(name), allow_patterns=list(_FILES), **options))


def read_release(
    name: str | Path, overrides: Mapping[str, Any] | None = None, **hub_options: Any
) -> dict[str, Any]:
    """What ``from_pretrained`` needs of a release in place of its name.

    Args:
        name: folder or hub id.
        overrides: fields of ``ProxyVConfig`` to set otherwise than the release has them.
        **hub_options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

    Returns:
        ``config``, ``state_dict`` under our names and, where the release brings one,
        ``generation_config``.

    Raises:
        ValueError: an override that the weights contradict (start layer, kind of proxies), or a
            release that is not complete.
    """
    folder = release_folder(name, **hub_options)
    raw = json.loads((folder / "config.json").read_text())
    vision = _vision_config(raw)
    config = released_config(raw, vision, image_token_index=_image_token_id(folder))
    for option, value in (overrides or {}).items():
        setattr(config, option, value)
    config.check_options()
    state = read_weights(folder)
    check_variant(state, config)
    loaded = from_released(state, config.start_layer)
    if not any(key.startswith("model.vision_tower.") for key in loaded):
        tower = CLIPVisionModel.from_pretrained(raw["mm_vision_tower"])
        loaded |= {f"model.vision_tower.{key}": t for key, t in tower.state_dict().items()}
    loaded = {key: t for key, t in loaded.items() if not key.endswith(".position_ids")}
    if config.tie_word_embeddings:
        loaded.setdefault("lm_head.weight", loaded["model.language_model.embed_tokens.weight"])
    parts: dict[str, Any] = {"config": config, "state_dict": loaded}
    if (folder / "generation_config.json").is_file():
        parts["generation_config"] = GenerationConfig.from_pretrained(folder)
    return parts


def release_parts(name: str | Path, **hub_options: Any) -> dict[str, Any]:
    """What a ``ProxyVProcessor`` of a release is made of: its arguments."""
    folder = release_folder(name, **hub_options)
    raw = json.loads((folder / "config.json").read_text())
    vision = _vision_config(raw)
    config: Any = released_config(raw, vision)
    images = crop_processor(vision.image_size, config.image_grid_pinpoints)
    ratio = raw.get("image_aspect_ratio", "anyres")
    tokenizer = read_tokenizer(folder)
    template = TEMPLATES.get(tokenizer.init_kwargs.get("proxyv_template", ""))
    return {
        "image_processor": images,
        "tokenizer": tokenizer,
        "chat_template": None if template is None else template.chat_template(),
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_aspect_ratio": "anyres" if ratio.startswith("anyres") else ratio,
        "crop_tokens": None if config.crop_tokens == config.side**2 else config.crop_tokens,
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from ``.safetensors`` or ``pytorch_model*.bin`` files.

    Raises:
        ValueError: the folder holds neither.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state |= load_weights(file)
    return state


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no weights: expected .safetensors or pytorch_model*.bin")
    return files


def load_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, ``.safetensors`` or what torch saved."""
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder, with an image token and the name of its chat template."""
    options: dict[str, Any] = {}
    config = Path(folder, "config.json")
    raw = json.loads(config.read_text()) if config.is_file() else {}
    if raw.get("model_type") in _FAMILIES:  # else transformers warns of a type that it cannot know
        options["config"] = PreTrainedConfig.from_dict(raw)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    add_image_token(tokenizer)
    vocabulary = tokenizer.get_vocab()
    for token, template in _TEMPLATES.items():
        if token in vocabulary:
            tokenizer.init_kwargs.setdefault("proxyv_template", template)
            break
    return tokenizer


_TEMPLATES = {  # what a vocabulary has, and the template that releases of it were trained with
    "<|start_header_id|>": "llama3",
    "<|action_start|>": "internlm2",
    "<repo_name>": "smollm2",
    "<|im_start|>": "qwen",
    "<|end|>": "phi3",
    "</s>": "v1",
}


def released_config(
    raw: Mapping[str, Any],
    vision_config: Mapping[str, Any] | PreTrainedConfig,
    *,
    image_token_index: int | None = None,
) -> ProxyVConfig:
    """Our configuration from the ``config.json`` of a released checkpoint.

    Args:
        raw: its contents.
        vision_config: configuration of the CLIP vision tower, which ``raw`` only names.
        image_token_index: id that stands for image rows; by default the first id behind the
            vocabulary.

    Returns:
        The configuration, in the released layout.

    Raises:
        ValueError: a released option that this model does not have, or a checkpoint of LLaVA's own
            code.
    """
    released_as = raw.get("model_type")
    if released_as not in _FAMILIES:
        raise ValueError(
            f"model_type={released_as!r} is not that of a released checkpoint: use one of "
            f"{', '.join(_FAMILIES)}"
        )
    if "proxyv" not in raw and "unpad" in raw.get("mm_patch_merge_type", ""):
        raise ValueError(
            f"mm_patch_merge_type={raw['mm_patch_merge_type']!r} without 'proxyv' is of LLaVA's "
            "own code, which packs crops otherwise: use the llava-hf version of that checkpoint"
        )
    family = _FAMILIES[released_as]
    text_config = AutoConfig.for_model(family)
    known = set(text_config.to_dict()) | {"rope_theta", "rope_scaling"}
    text = {k: v for k, v in raw.items() if k in known and k not in _NOT_TEXT}
    if family == "phi3":  # a cache of image rows is longer than its window, see ProxyVConfig
        text["sliding_window"] = None
    if not isinstance(vision_config, PreTrainedConfig):
        vision_config = {"model_type": "clip_vision_model", **vision_config}
    pinpoints = raw.get("image_grid_pinpoints")
    options: dict[str, Any] = dict(raw.get("proxyv_options", {}))
    if pinpoints is not None:
        options["image_grid_pinpoints"] = [[height, width] for width, height in pinpoints]
    reduction = raw.get("proxyv_reduce_factor", 4)
    if raw.get("learn_proxy"):
        options["proxy_kind"] = "learned"
        if raw.get("per_crop_token_len") is not None:
            options.setdefault("learned_proxies", raw["per_crop_token_len"] // reduction**2)
    return ProxyVConfig(
        vision_config=vision_config,
        text_config={**text, "model_type": family},
        image_token_index=raw["vocab_size"] if image_token_index is None else image_token_index,
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=(
            "default" if raw.get("mm_vision_select_feature", "patch") == "patch" else "full"
        ),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        start_layer=raw["proxyv_start_layer"] if raw.get("proxyv") else None,
        side_reduction=reduction,
        **{"layout": "released", **options},
    )


def to_released_config(config: ProxyVConfig, image_aspect_ratio: str) -> dict[str, Any]:
    """A ``config.json`` in the released form; the inverse of ``released_config``.

    Args:
        config: ours.
        image_aspect_ratio: how its processor cuts images, "anyres" or "pad".

    Returns:
        The keys that the authors' code reads, CLIP-L/14-336 named as the tower. What it cannot
        express (natural positions, average downsampling, another guided width, token reduction,
        another tower) stands under ``proxyv_options`` and ``proxyv_vision_config``, which only we
        read.

    Raises:
        ValueError: layers that skip, a family, a packing or a projector that the authors' code
            does not have.
    """
    text, method = config.text_config, config.reduction_method
    if config.skip is not None:
        raise ValueError(f"skip={config.skip!r} has no released form: the authors' code has none")
    if text.model_type not in _CLASSES or config.packing != "crops":
        raise ValueError(
            f"text_config.model_type={text.model_type!r} with packing={config.packing!r} has no "
            f"released form: the authors' code has {', '.join(_CLASSES)}, with packing 'crops'"
        )
    if method is not None and method.weights:
        raise ValueError(
            f"reduction={config.reduction!r} has no released form: the authors' code has no module "
            "for the weights of this method. Convert a model with a method without weights"
        )
    released_as = next(name for name, family in _FAMILIES.items() if family == text.model_type)
    pinpoints: Any = config.image_grid_pinpoints
    crop_px = config.vision_config.image_size
    theirs = {
        "layout": "released",
        "downsample": "bilinear",
        "proxy_positions": "consecutive",
        "guided_ratio": None,
        "learned_proxies": None,
        "reduction": None,
    }
    options = {
        name: getattr(config, name)
        for name, value in theirs.items()
        if getattr(config, name) != value
    }
    tower = config.vision_config.to_dict()
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    return {
        **{k: v for k, v in text.to_dict().items() if k not in (*_NOT_TEXT, "rope_parameters")},
        "rope_theta": theta,
        **({} if kind == "default" and len(rope) == 1 else {"rope_scaling": rope}),
        "model_type": released_as,
        "architectures": [_CLASSES[text.model_type]],
        "tie_word_embeddings": config.tie_word_embeddings,
        "mm_vision_tower": f"openai/{_CLIP_L_336}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": (
            "patch" if config.vision_feature_select_strategy == "default" else "cls_patch"
        ),
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": image_aspect_ratio,
        "image_grid_pinpoints": [[width, height] for height, width in pinpoints],
        "image_token_len_per_side": config.side,
        "per_crop_token_len": config.crop_tokens,
        "max_num_image_crops": max(h * w for h, w in pinpoints) // crop_px**2 + 1,
        "proxyv": config.start_layer is not None,
        "proxyv_start_layer": config.start_layer or 0,
        "proxyv_reduce_factor": config.side_reduction,
        "learn_proxy": config.proxy_kind == "learned",
        **({"proxyv_options": options} if options else {}),
        **({} if _is_clip_l_336(config.vision_config) else {"proxyv_vision_config": tower}),
    }


def _hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}


def _raw_config(name: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    return PreTrainedConfig.get_config_dict(name, **_hub(options))[0]


def _image_token_id(folder: Path) -> int | None:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer = read_tokenizer(folder)
    return tokenizer.convert_tokens_to_ids("<image>")


def _vision_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Configuration of the tower that a release names; CLIP-L/14-336 is known without the hub."""
    if "proxyv_vision_config" in raw:
        return CLIPVisionConfig.from_dict(raw["proxyv_vision_config"])
    name = str(raw.get("mm_vision_tower") or "")
    if Path(name).name == _CLIP_L_336 and not Path(name).is_dir():
        known: Any = LlavaNextConfig().vision_config  # the same tower, as LLaVA-NeXT's default
        return known
    if not name:
        raise ValueError("config.json names no mm_vision_tower, so no release can be read from it")
    return CLIPVisionConfig.from_pretrained(name)


def _is_clip_l_336(vision: PreTrainedConfig) -> bool:
    known: Any = LlavaNextConfig().vision_config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    rules = ("num_attention_heads", "hidden_act", "layer_norm_eps")  # weights do not show these
    return all(getattr(vision, name) == getattr(known, name) for name in (*sizes, *rules))
