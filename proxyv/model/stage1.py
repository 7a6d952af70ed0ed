"""Stage-1 adapter files: what stage 1 trains, in one small file.

Two forms: ours, a ``.safetensors`` file under our names, and the authors' ``mm_projector.bin``
under theirs. Both hold projector, newline and ProxyV modules; which layers those belong to is
checked when one is read, never guessed. Ours also says how the model was built that trained them
(``stage1_facts``); theirs cannot, and is always of a model built as the authors'.

Source: authors' training code, ``mm_projector.bin`` at the end of stage 1. Differs: another start
    layer, or a file without ProxyV modules, is an error; theirs load what fits, silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from proxyv.model.checkpoints import check_variant, from_released, load_exactly, to_released

__all__ = [
    "load_projector",
    "load_stage1",
    "read_stage1",
    "save_stage1",
    "stage1_facts",
    "write_stage1",
]

_OURS = re.compile(
    r"\.(multi_modal_projector|guided_update|proxy_initializer|light_mlp)\.|\.image_newline$"
)
_THEIRS = re.compile(r"model\.vision_mlp_layers\.\d+\.")
_RELEASED = {"layout": "released", "downsample": "bilinear", "proxy_positions": "consecutive"}
"""How the authors' models are built: all that a file of theirs can be read as."""
_DEFAULTS = {**_RELEASED, "layout": "natural"}
_FACTS = (*_RELEASED, "side_reduction")  # which the config.json beside a file of theirs says
_LAYER = re.compile(r"\.layers\.(\d+)\.(?:guided_update|proxy_initializer)\.")


def save_stage1(model: nn.Module, path: str | Path) -> None:
    """Write what stage 1 trains; the form follows from the suffix, see ``write_stage1``.

    Args:
        model: a ``ProxyVForConditionalGeneration``.
        path: file to write, ``.safetensors`` or ``.bin``.

    Raises:
        ValueError: see ``write_stage1``.
    """
    facts = {name: getattr(model.config, name) for name in _FACTS}
    write_stage1(_stage1_part(model), path, _first_update(model.config), facts)


def load_stage1(model: nn.Module, path: str | Path) -> None:
    """Load a stage-1 file of either form into a model, all of it or nothing.

    Args:
        model: a ``ProxyVForConditionalGeneration`` on any device but meta.
        path: ``.safetensors`` or ``.bin`` file.

    Raises:
        ValueError: another start layer, another kind of proxies, or tensors that do not fit.
    """
    config: Any = model.config
    state = read_stage1(path, _first_update(config))
    if config.skip is None:
        check_variant(to_released(state, config.start_layer), config)
    load_exactly(model, state, _stage1_part(model))


def load_projector(model: nn.Module, path: str | Path) -> None:
    """Load projector and newline from a stage-1 file of a baseline, whatever the model's layers.

    Args:
        model: a ``ProxyVForConditionalGeneration`` on any device but meta.
        path: ``.safetensors`` or ``.bin`` file without ProxyV modules.

    Raises:
        ValueError: a file with ProxyV modules, or tensors that do not fit.

    Source: LLaVA's ``pretrain_mm_mlp_adapter``. Differs: the newline has to be there too.
    """
    wanted = {name: t for name, t in _stage1_part(model).items() if ".layers." not in name}
    load_exactly(model, read_stage1(path, None), wanted)


def read_stage1(path: str | Path, start_layer: int | None) -> dict[str, Tensor]:
    """Read a stage-1 file of either form, under our names.

    Args:
        path: ``.safetensors`` or ``.bin`` file.
        start_layer: layer that the first guided update belongs to; a file under the authors'
            names does not say it. None for a baseline.

    Raises:
        ValueError: another start layer than the file's, or no stage-1 file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state = load_file(path)
    elif path.suffix == ".bin":
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{path}: expected a .safetensors or a .bin file")
    if any(name.startswith("model.mm_projector.") for name in state):
        updates = len({m[0] for m in map(_THEIRS.match, state) if m})
        if bool(updates) != (start_layer is not None):
            raise ValueError(
                f"{path} holds {updates} guided updates, but start_layer="
                f"{'null' if start_layer is None else start_layer}: "
                + ("name the layer of the first" if updates else "it is a baseline's, use null")
            )
        return from_released(state, start_layer)
    layers = sorted({int(match[1]) for match in map(_LAYER.search, state) if match})
    found = layers[0] if layers else None
    if not any("multi_modal_projector" in name for name in state):
        raise ValueError(f"{path} is no stage-1 file: it holds no projector")
    if found != start_layer:
        raise ValueError(
            f"{path} was trained with start_layer={found}, but the model has "
            f"start_layer={start_layer}: build the model with start_layer="
            f"{'null' if found is None else found}"
        )
    return state


def stage1_facts(path: str | Path) -> dict[str, Any]:
    """How the model was built that a stage-1 file is from: fields of its configuration.

    A ``.safetensors`` file that says nothing is from a model with the defaults.
    """
    path = Path(path)
    if path.suffix == ".bin":
        return {"layout": "released"}
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("facts", "{}"))


def write_stage1(
    state: Mapping[str, Tensor],
    path: str | Path,
    start_layer: int | None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a stage-1 file: ``.safetensors`` under our names, ``.bin`` under the authors'.

    Args:
        state: tensors under our names.
        path: file to write.
        start_layer: layer that the first guided update belongs to; None for a baseline.
        facts: how the model was built, as ``stage1_facts`` gives it; None for the defaults.

    Raises:
        ValueError: another suffix, or a model that a ``.bin`` would be read as another of.
    """
    path, facts = Path(path), dict(facts or {})
    if path.suffix == ".safetensors":
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        metadata = {"format": "pt", "start_layer": str(start_layer), "facts": json.dumps(facts)}
        save_file(tensors, path, metadata=metadata)
    elif path.suffix == ".bin":
        built = _DEFAULTS | facts
        for name, wanted in _RELEASED.items():
            if built[name] != wanted:
                raise ValueError(
                    f"{path}: {name}={built[name]!r} cannot be said in a .bin file, which is read "
                    f"as {wanted!r}: write a .safetensors file"
                )
        torch.save(to_released(state, start_layer), path)
    else:
        raise ValueError(f"{path}: the name must end in .safetensors (ours) or .bin (the authors')")


def _first_update(config: Any) -> int | None:
    """The layer of the first guided update; None for a baseline, and without proxies."""
    return config.start_layer if config.skip is None else None


def _stage1_part(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors that stage 1 trains."""
    return {name: t for name, t in model.state_dict().items() if _OURS.search(name)}
