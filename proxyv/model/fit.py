"""Whether saved weights fit a configuration, said in the configuration's words.

transformers names tensors where weights do not fit, and only warns where modules are new or
unknown. Here the option is named, its value, and the value that the weights have; and tensors
that no file holds, which transformers would draw at random, are an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from proxyv.reduction.base import ProjectorReduction

__all__ = ["check_complete", "check_fit"]

_LAYERS = {
    "text_config": re.compile(r"\blanguage_model\.layers\.(\d+)\."),
    "vision_config": re.compile(r"\bvision_tower\..*\blayers\.(\d+)\."),
}
_PROJECTOR = "multi_modal_projector."
_STOCK_PROJECTOR = re.compile(r"\bmulti_modal_projector\.linear_[12]\.")
_PROXYV = re.compile(r"\blayers\.(\d+)\.(guided_update|proxy_initializer|light_mlp)\.")

# Tensor, dimension, the option that it follows from, and the option's value for a size; what a
# model is as a whole comes first, because everything else follows from it.
_SIZES: tuple[tuple[str, int, str, Callable[[int, Any], Any]], ...] = (
    (r"embed_tokens\.weight", 1, "text_config.hidden_size", lambda size, _: size),
    (r"embed_tokens\.weight", 0, "text_config.vocab_size", lambda size, _: size),
    (r"mlp\.(gate|up)_proj\.weight", 0, "text_config.intermediate_size", lambda size, _: size),
    (r"mlp\.gate_up_proj\.weight", 0, "text_config.intermediate_size", lambda size, _: size // 2),
    (r"\.q_proj\.weight", 0, "text_config.num_attention_heads", lambda n, c: n // c.head_width),
    (r"\.k_proj\.weight", 0, "text_config.num_key_value_heads", lambda n, c: n // c.head_width),
    (r"patch_embedding\.weight", 0, "vision_config.hidden_size", lambda size, _: size),
    (r"patch_embedding\.weight", 2, "vision_config.patch_size", lambda size, _: size),
    (r"position_embedding\.weight", 0, "vision_config.image_size", lambda n, c: _image_px(n, c)),
    (r"\.mlp\.fc1\.weight", 0, "vision_config.intermediate_size", lambda size, _: size),
    (
        r"guided_update\.input_proj\.weight",
        0,
        "guided_ratio",
        lambda size, c: size / c.text_config.hidden_size,
    ),
    (r"proxy_initializer\.queries", 0, "learned_proxies", lambda size, _: size),
)


def check_fit(
    name: object,
    config: Any,
    report: Mapping[str, Any],
    expected: Collection[str],
    *,
    sizes: bool = True,
    fresh: bool = True,
) -> None:
    """Refuse weights of another depth, variant or width than the configuration's, or with holes.

    Two kinds of modules may start anew: all ProxyV modules where the weights are a baseline's, and
    the projector of a token-reduction method where the weights bring another projector.

    Args:
        name: what was loaded, for the message.
        config: the ``ProxyVConfig`` of the model.
        report: what transformers says of loading: ``missing_keys`` and ``unexpected_keys``
            (names) and ``mismatched_keys`` (name, shape in the file, shape in the model).
        expected: names of all tensors of the model.
        sizes: refuse other widths too; not where the caller asked for new tensors instead.
        fresh: let modules start anew; else no tensor may be missing.

    Raises:
        ValueError: naming the option, its value and the one that the weights have, or the tensors
            that are missing.
    """
    missing = set(report["missing_keys"])
    held = (set(expected) - missing) | set(report["unexpected_keys"])
    _check_depth(name, config, held)
    _check_variant(name, config, held)
    if fresh:
        missing -= _starting_anew(config, missing, held)
    check_complete(name, missing)
    if not sizes:
        return
    shapes = {key: (tuple(file), tuple(own)) for key, file, own in report["mismatched_keys"]}
    for pattern, dim, option, value in _SIZES:
        part = "vision_tower" if option.startswith("vision") else "language_model"
        for key, (file, own) in sorted(shapes.items()):
            if part not in key or not re.search(pattern, key):
                continue
            if len(file) == len(own) and file[dim] != own[dim]:
                _refuse(name, option, _current(config, option), value(file[dim], config))
    if shapes:
        key, (file, own) = min(shapes.items())
        raise ValueError(
            f"the configuration does not fit the weights of {name}: {key} is {file} there, but "
            f"{own} in the model, and so {len(shapes)} tensors in all; load another model"
        )


def check_complete(name: object, missing: Collection[str]) -> None:
    """Refuse weights with holes.

    Args:
        name: what was loaded, for the message.
        missing: names of the model's tensors that no file holds.

    Raises:
        ValueError: there are any.
    """
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise ValueError(
            f"the weights of {name} are incomplete: {len(missing)} tensors of the model are "
            f"missing ({shown}{', ...' if len(missing) > 3 else ''}) and would stay random: get "
            "the whole checkpoint, correct its config.json, or convert one of another form first "
            "(python -m proxyv.convert)"
        )


def _check_depth(name: object, config: Any, held: set[str]) -> None:
    """Refuse another number of layers of the language model or of the tower."""
    for part, layer in _LAYERS.items():
        found = {int(match[1]) for match in map(layer.search, held) if match}
        depth = _current(config, f"{part}.num_hidden_layers")
        if found and len(found) != depth:
            _refuse(name, f"{part}.num_hidden_layers", depth, len(found))


def _check_variant(name: object, config: Any, held: set[str]) -> None:
    """Refuse ProxyV modules of other layers or of another kind than the configuration's."""
    modules = {(int(m[1]), m[2]) for m in map(_PROXYV.search, held) if m}
    if not modules:
        return  # a baseline: all of them are new
    start = min(layer for layer, _ in modules)
    if start != config.start_layer:
        _refuse(name, "start_layer", config.start_layer, start)
    skip = "atn_ffn" if (start, "light_mlp") in modules else None
    if skip != config.skip:
        _refuse(name, "skip", config.skip, skip)
    kind = "learned" if (start, "proxy_initializer") in modules else "spatial"
    if kind != config.proxy_kind:
        _refuse(name, "proxy_kind", config.proxy_kind, kind)


def _starting_anew(config: Any, missing: set[str], held: set[str]) -> set[str]:
    """Which missing tensors belong to modules that are new as a whole.

    Args:
        config: the ``ProxyVConfig`` of the model.
        missing: names of the model's tensors that no file holds.
        held: names of all tensors that the files hold, the model's and others.
    """
    new: set[str] = set()
    if not any(_PROXYV.search(key) for key in held):
        new |= {key for key in missing if _PROXYV.search(key)}
    method = config.reduction_method
    if isinstance(method, ProjectorReduction):
        found = [key for key in held if _PROJECTOR in key]
        # Files without any projector have a hole; those with the stock one are a baseline's.
        if found and all(_STOCK_PROJECTOR.search(key) for key in found):
            new |= {key for key in missing if _PROJECTOR in key}
    return new


def _refuse(name: object, option: str, value: Any, found: Any) -> NoReturn:
    raise ValueError(
        f"{option}={value!r} does not fit the weights of {name}, which have {option}={found!r}: "
        f"set it to {found!r}, or load another model"
    )


def _current(config: Any, option: str) -> Any:
    for part in option.split("."):
        config = getattr(config, part)
    return config


def _image_px(positions: int, config: Any) -> int:
    """Pixels a side of a tower with so many positions, the class token's included."""
    return round((positions - 1) ** 0.5) * config.vision_config.patch_size
