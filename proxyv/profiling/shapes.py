"""Which model is profiled: a preset, or a shape given on the command line; never any weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.cli import nearest
from proxyv.config import ProxyVConfig
from proxyv.profiling.paper import PAPER
from proxyv.reduction import build_reduction

__all__ = [
    "arm_name",
    "check_kept",
    "describe_methods",
    "from_preset",
    "from_shape",
    "further_arms",
    "start_layers",
    "with_start",
]

_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}


def from_preset(preset: str) -> ProxyVConfig:
    """The configuration of a folder under ``configs/``.

    Raises:
        ValueError: no such preset.
        OSError: its configuration files cannot be found.
    """
    # A shape needs nothing of what training needs.
    from proxyv.train.build import build_on_meta
    from proxyv.train.config_files import load_settings, preset_file

    config = build_on_meta(load_settings(preset_file(preset, "pretrain"))).config
    if getattr(config.text_config, "sliding_window", None) is not None:
        config.text_config.sliding_window = None  # a baseline's window would hide image rows too
    return config


def from_shape(text: str) -> ProxyVConfig:
    """A configuration from ``layers=16,width=1024,heads=16,ffn=2752``.

    Args:
        text: these four, and what differs from ``key_heads=`` (heads), ``vocab=32000``,
            ``family=llama``, ``side=24`` (of a crop, in patches) and ``reduction=4``.

    Raises:
        ValueError: an unknown or missing field, or a value that is no positive integer.
    """
    family = "llama"
    numbers = {"vocab": 32000, "side": 24, "reduction": 4}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if name == "family":
            family = value
            continue
        known = [*_FIELDS, "side", "reduction", "family"]
        if name not in known:
            raise ValueError(nearest("field of --shape", name, known))
        if not value.isdigit() or int(value) < 1:
            raise ValueError(f"--shape {name}={value!r}: must be a positive integer")
        numbers[name] = int(value)
    missing = [name for name in ("layers", "width", "heads", "ffn") if name not in numbers]
    if missing:
        raise ValueError(f"--shape {text!r} lacks {', '.join(missing)}: write {missing[0]}=NUMBER")
    numbers.setdefault("key_heads", numbers["heads"])
    side, reduction = numbers.pop("side"), numbers.pop("reduction")
    language = {_FIELDS[name]: value for name, value in numbers.items()}
    language |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 14 * side, "patch_size": 14}
    return ProxyVConfig(
        text_config={"model_type": family, "max_position_embeddings": 1 << 16, **language},
        vision_config=vision,
        side_reduction=reduction,
    )


def with_start(config: ProxyVConfig, start: int | None, **options: Any) -> ProxyVConfig:
    """The same configuration with other ProxyV options.

    Raises:
        ValueError: options that ``ProxyVConfig`` refuses.
    """
    changed = copy.deepcopy(config)
    for name, value in {"start_layer": start, **options}.items():
        setattr(changed, name, value)
    changed.check_options()
    return changed


def further_arms(
    config: ProxyVConfig,
    starts: Sequence[int],
    skips: Sequence[str],
    reductions: Sequence[Mapping[str, Any]],
) -> list[ProxyVConfig]:
    """Layers that skip, from each start; each method alone, then with ProxyV from each start.

    Raises:
        ValueError: a method that does not go with the ProxyV layers asked for.
    """
    plain = {"proxy_kind": "spatial", "learned_proxies": None}
    found = [with_start(config, start, skip=skip, **plain) for skip in skips for start in starts]
    for method in reductions:
        alone = with_start(config, None, reduction=dict(method), **plain)
        found += [alone, *(with_start(config, s, reduction=dict(method)) for s in starts)]
    return found


def arm_name(config: ProxyVConfig, learned: bool = False) -> str:
    """What tables call a model: baseline, ProxyV-L12, ATN-L12, fastv, ProxyV-L12+fastv.

    Args:
        config: of the model.
        learned: say of a ProxyV model that its proxies are learned, "ProxyV-L12 learned".
    """
    method = config.reduction_method
    if config.start_layer is None:
        return "baseline" if method is None else method.name
    kind = {None: "ProxyV", "atn": "ATN", "atn_ffn": "ATN+FFN"}[config.skip]
    said = " learned" if learned and config.skip is None and config.proxy_kind == "learned" else ""
    return f"{kind}-L{config.start_layer}{said}" + ("" if method is None else f"+{method.name}")


def describe_methods(reductions: Sequence[Mapping[str, Any]], kept: int | None) -> str:
    """The options of every method, as a note below a table; empty without methods."""
    if not reductions:
        return ""
    parts = []
    for mapping in reductions:
        options = build_reduction(mapping).options()
        name = options.pop("method")
        parts.append(f"{name} {json.dumps(options)}")
    left = "" if kept is None else f" Where the image decides, {kept} tokens of a crop are left."
    return f" Token reduction: {'; '.join(parts)}.{left}"


def check_kept(config: ProxyVConfig, kept: int | None) -> None:
    """Refuse a number of tokens that a crop cannot keep.

    Raises:
        ValueError: none where the image decides, or more than there are.
    """
    method: Any = config.reduction_method
    if not config.image_decides:
        return
    if kept is None:
        raise ValueError(
            f"how many tokens method {method.name!r} leaves depends on the image: say how many of "
            "a crop with --kept"
        )
    if not 1 <= kept <= config.side**2:
        raise ValueError(f"--kept must be from 1 to {config.side**2}, a crop's tokens; got {kept}")


def start_layers(given: str | None, preset: str | None, config: ProxyVConfig) -> Sequence[int]:
    """Layers from the command line, else the paper's, else the preset's own, else the middle."""
    if given is not None:
        parts = given.split(",")
        if not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"--start-layers {given!r}: write layers with commas, such as 8,6")
        return [int(part) for part in parts]
    if preset in PAPER:
        return list(PAPER[preset])
    middle = config.text_config.num_hidden_layers // 2
    return [middle if config.start_layer is None else config.start_layer]
