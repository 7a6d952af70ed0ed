"""LoRA and QLoRA: what stands in for the weights of the language model while it trains.

peft's layers take the place of the projections, which ProxyV layers call and never read, so they
act on full, proxy, newline and text rows alike. What is saved is a plain model: adapters are
merged into the weights that they were trained with.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from proxyv.train.settings import LoraSettings

__all__ = ["add_adapters", "has_adapters", "plain_state", "quantize", "save_adapters"]

TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""Every projection of the language model's own; those of guided updates train in full."""

_ADAPTER = "default"
_BASE, _LORA = ".base_layer.", ".lora_"


def add_adapters(model: nn.Module, lora: LoraSettings) -> None:
    """Put adapters on the projections of the language model; they start as no change at all."""
    from peft import LoraConfig, inject_adapter_in_model

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(_config(LoraConfig, lora), model)  # freezes all the rest
    for parameter in trained:
        parameter.requires_grad_(True)


def _config(kind: Any, lora: LoraSettings) -> Any:
    return kind(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=TARGETS
    )


def has_adapters(name: str) -> bool:
    """Whether a parameter, by its name, belongs to an adapter."""
    return _LORA in name


def quantize(model: Any) -> dict[str, Tensor]:
    """Hold the projections of the language model in 4 bits (NF4).

    Returns:
        The weights as they were, by name, on the CPU.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "model.quantize=nf4: bitsandbytes is not installed; pip install bitsandbytes, or set "
            "model.quantize=none"
        )
    from bitsandbytes.nn import Linear4bit, Params4bit

    before = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or not re.fullmatch(TARGETS, name):
            continue
        weight = module.weight.data
        small = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        small.weight = Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4")
        small.bias = module.bias
        before[f"{name}.weight"] = weight.cpu()
        model.set_submodule(name, small.to("cuda" if torch.cuda.is_available() else "cpu"))
    return before


def plain_state(
    model: nn.Module, state: dict[str, Tensor], originals: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a plain model: adapters merged, nothing in 4 bits.

    Args:
        model: with adapters or 4-bit matrices, or neither.
        state: its gathered weights.
        originals: of :func:`quantize`; a 4-bit matrix without an adapter goes back to them.

    Returns:
        Weights under the names of a model without adapters.
    """
    plain = {
        name.replace(_BASE, "."): value
        for name, value in state.items()
        if not has_adapters(name) and not _belongs_to_4bit(name, originals)
    }
    plain |= originals
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, dict) or f"{name}.lora_A.{_ADAPTER}.weight" not in state:
            continue
        down, up = (state[f"{name}.lora_{part}.{_ADAPTER}.weight"] for part in "AB")
        weight = plain[f"{name}.weight"]
        if f"{name}.weight" in originals:
            weight = _dequantized(module.get_base_layer(), weight)  # type: ignore[operator]
        change = scaling[_ADAPTER] * (up.float() @ down.float())
        plain[f"{name}.weight"] = (weight.float() + change.to(weight.device)).to(weight.dtype)
    return plain


def _belongs_to_4bit(name: str, originals: dict[str, Tensor]) -> bool:
    """Whether an entry of the state is a packed matrix or one of its statistics."""
    path, mark, _ = name.replace(_BASE, ".").partition(".weight")
    return bool(mark) and f"{path}.weight" in originals


def _dequantized(layer: Any, like: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(like.device, like.dtype)


def save_adapters(lora: LoraSettings, state: dict[str, Tensor], folder: Path) -> None:
    """Write the adapters alone, in peft's format."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    adapters = {
        "base_model.model." + name.replace(f".{_ADAPTER}.", "."): value.contiguous().cpu()
        for name, value in state.items()
        if has_adapters(name)
    }
    save_file(adapters, folder / "adapter_model.safetensors")
    _config(LoraConfig, lora).save_pretrained(folder)
