"""The released checkpoints' names, to ours and back.

The released layout is LLaVA's: one flat ``model.`` with the language model at the top, the
projector as ``mm_projector``, and one ``vision_mlp_layers.k`` for decoder layer start + k. The two
halves of its ``proj.0`` are two weights here (see ``guided_update.py``). What makes learned proxies
is ``proxyv_initializer`` there and a part of the first ProxyV layer here.

Source: released checkpoints and the authors' model classes (names and shapes).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from proxyv.config import ProxyVConfig

__all__ = [
    "check_exactly",
    "check_variant",
    "from_released",
    "load_exactly",
    "to_released",
]

_RENAMES = (
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
_BACK = (
    (r"model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (
        r"model\.vision_tower\.(vision_model\.)?",
        "model.vision_tower.vision_tower.vision_model.",
    ),
    (r"model\.language_model\.", "model."),
)
_GUIDED = {
    "input_proj.weight": "input_proj.weight",
    "context_proj.weight": "context_proj.weight",
    "proj.2.weight": "output_proj.weight",
    "layernorm_post.weight": "norm.weight",
}
_INITIALIZER = {"proxyv_tokens": "queries", "Wk.weight": "key_proj.weight"}
_INITIALIZER_BACK = {ours: theirs for theirs, ours in _INITIALIZER.items()}
_HALVES = {
    "merge_input.weight": ("merge_input", "merge_context"),
    "merge_context.weight": ("merge_context", "merge_input"),
}
_GUIDED_BACK = {ours: theirs for theirs, ours in _GUIDED.items()}


def from_released(state: Mapping[str, Tensor], start_layer: int | None) -> dict[str, Tensor]:
    """Rename a released state dict to ours.

    Args:
        state: tensors under the released names.
        start_layer: decoder layer that ``vision_mlp_layers.0`` belongs to; None for a baseline.

    Returns:
        The same tensors under our names; ``proj.0`` split into its two halves. Names that are
        not known are kept, so that loading can report them.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        made = re.fullmatch(r"model\.proxyv_initializer\.(.+)", name)
        if made is not None and start_layer is not None:
            prefix = f"model.language_model.layers.{start_layer}.proxy_initializer."
            renamed[prefix + _INITIALIZER.get(made[1], made[1])] = tensor
            continue
        match = re.fullmatch(r"model\.vision_mlp_layers\.(\d+)\.(.+)", name)
        if match is None or start_layer is None:
            renamed[_rename(name, _RENAMES)] = tensor
            continue
        layer, part = start_layer + int(match[1]), match[2]
        prefix = f"model.language_model.layers.{layer}.guided_update."
        if part == "proj.0.weight":
            for_input, for_context = tensor.chunk(2, dim=1)
            renamed[prefix + "merge_input.weight"] = for_input.contiguous()
            renamed[prefix + "merge_context.weight"] = for_context.contiguous()
        else:
            renamed[prefix + _GUIDED.get(part, part)] = tensor
    return renamed


def to_released(state: Mapping[str, Tensor], start_layer: int | None) -> dict[str, Tensor]:
    """Rename our state dict to the released names; the inverse of ``from_released``.

    Args:
        state: tensors under our names.
        start_layer: first ProxyV layer; None for a baseline.

    Returns:
        The same tensors under the released names; the halves of ``proj.0`` joined.

    Raises:
        ValueError: one half of a ``proj.0`` without the other.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        made = re.fullmatch(r"model\.language_model\.layers\.\d+\.proxy_initializer\.(.+)", name)
        if made is not None:
            part = _INITIALIZER_BACK.get(made[1], made[1])
            renamed[f"model.proxyv_initializer.{part}"] = tensor
            continue
        match = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.guided_update\.(.+)", name)
        if match is None:
            renamed[_rename(name, _BACK)] = tensor
            continue
        prefix = f"model.vision_mlp_layers.{int(match[1]) - (start_layer or 0)}."
        part = match[2]
        if part in _HALVES:
            own, other = _HALVES[part]
            pair = name.replace(own, other)
            if pair not in state:
                raise ValueError(f"{name} is there, but its other half {other} is not")
        if part == "merge_context.weight":
            continue  # goes with the other
        if part == "merge_input.weight":
            renamed[prefix + "proj.0.weight"] = torch.cat([tensor, state[pair]], dim=1)
        else:
            renamed[prefix + _GUIDED_BACK.get(part, part)] = tensor
    return renamed


def load_exactly(model: nn.Module, loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Load tensors that must be exactly the given ones of the model, or nothing.

    Args:
        model: the model.
        loaded: tensors under the model's names.
        own: the model's tensors that are to be loaded.

    Raises:
        ValueError: missing, unexpected or differently shaped tensors, all named.
    """
    check_exactly(loaded, own)
    model.load_state_dict(loaded, strict=False)


def check_exactly(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors other than exactly the given ones of a model.

    Args:
        loaded: tensors of a checkpoint.
        own: the model's tensors, under the same names.

    Raises:
        ValueError: missing, unexpected or differently shaped tensors, all named.
    """
    faults = {
        "missing": sorted(own.keys() - loaded.keys()),
        "unexpected": sorted(loaded.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(loaded[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & loaded.keys())
            if own[name].shape != loaded[name].shape
        ],
    }
    problems = [
        f"{len(names)} {what}: {', '.join(names)}" for what, names in faults.items() if names
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model; tensors " + "; ".join(problems))


def check_variant(state: Mapping[str, Tensor], config: ProxyVConfig) -> None:
    """Refuse a checkpoint of another start layer or another kind of proxies.

    Args:
        state: tensors under the released names.
        config: of the model that they are meant for.

    Raises:
        ValueError: saying what the checkpoint is, and what the model is.
    """
    _check_start_layer(state, config)
    _check_proxy_kind(state, config)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    return name


def _check_start_layer(state: Mapping[str, Tensor], config: ProxyVConfig) -> None:
    """Refuse a checkpoint with another number of guided updates than the model's."""
    found = {
        int(match[1])
        for match in (re.match(r"model\.vision_mlp_layers\.(\d+)\.", name) for name in state)
        if match
    }
    layers = config.text_config.num_hidden_layers
    expected = 0 if config.start_layer is None else layers - config.start_layer
    if len(found) != expected:
        theirs = f"start_layer={layers - len(found)}" if found else "a baseline (start_layer=null)"
        raise ValueError(
            f"the checkpoint holds {len(found)} guided updates, which is {theirs} at {layers} "
            f"layers, but the model has start_layer={config.start_layer}"
        )


def _check_proxy_kind(state: Mapping[str, Tensor], config: ProxyVConfig) -> None:
    """Refuse a checkpoint whose proxies are made in another way than the model's."""
    if config.start_layer is None:
        return
    learned = any(name.startswith("model.proxyv_initializer.") for name in state)
    kind = "learned" if learned else "spatial"
    if kind != config.proxy_kind:
        raise ValueError(
            f"the checkpoint has {kind} proxies, but the model has proxy_kind="
            f"{config.proxy_kind!r}: build the model with proxy_kind={kind!r}"
        )
