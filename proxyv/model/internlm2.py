"""InternLM2 weights as Llama weights, exactly: other names, and one fused projection taken apart.

InternLM2 (and 2.5) computes what Llama computes. Its ``wqkv`` interleaves the heads: with K key
heads and g query heads to each, its rows are K groups of ``[g query heads, key head, value head]``.
Taken apart, query heads stand in the order in which grouped attention expects them.

Source: InternLM2's published configuration and weights (names and shapes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from proxyv.model.fit import check_complete
from proxyv.model.released import load_weights, weight_files

__all__ = ["convert_internlm2", "from_internlm2", "internlm2_config"]

_RENAMES = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "model.norm.": "model.norm.",
    "output.": "lm_head.",
    "attention.wo.": "self_attn.o_proj.",
    "attention_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
}
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
)


def internlm2_config(raw: Mapping[str, Any]) -> LlamaConfig:
    """The Llama configuration of an InternLM2 model.

    Args:
        raw: its ``config.json``.

    Raises:
        ValueError: the configuration of another model.
    """
    if raw.get("model_type") != "internlm2":
        raise ValueError(f"model_type={raw.get('model_type')!r}: expected 'internlm2'")
    same = {name: raw[name] for name in _SAME if raw.get(name) is not None}
    return LlamaConfig(**same, attention_bias=bool(raw.get("bias", False)))


def from_internlm2(state: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Rename the weights of an InternLM2 causal language model to Llama's.

    Args:
        state: tensors under InternLM2's names; a part of a model, such as one shard, will do.
        config: as ``internlm2_config`` gives it.

    Returns:
        The same values under Llama's names, ``wqkv`` taken apart; buffers of rotary tables are
        left out, because Llama computes them.

    Raises:
        ValueError: a name that InternLM2 does not have, or a ``wqkv`` of another size.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
        prefix, rest = (layer[1], layer[2]) if layer else ("", name)
        if rest.endswith("rotary_emb.inv_freq"):
            continue
        if rest in ("attention.wqkv.weight", "attention.wqkv.bias"):
            kind = rest.rpartition(".")[2]
            for part, rows in zip("qkv", _take_apart(name, tensor, config), strict=True):
                renamed[f"{prefix}self_attn.{part}_proj.{kind}"] = rows
            continue
        old = next((old for old in _RENAMES if rest.startswith(old)), None)
        if old is None:
            raise ValueError(f"{name} is not the name of an InternLM2 weight")
        renamed[prefix + _RENAMES[old] + rest.removeprefix(old)] = tensor
    return renamed


def _take_apart(name: str, fused: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(K*(g+2)*h, ...) -> query (K*g*h, ...), key and value (K*h, ...)."""
    keys = config.num_key_value_heads or config.num_attention_heads
    group = config.num_attention_heads // keys
    width = config.hidden_size // config.num_attention_heads
    rows = keys * (group + 2) * width
    if fused.shape[0] != rows:
        raise ValueError(
            f"{name} has {fused.shape[0]} rows, but {config.num_attention_heads} query and {keys} "
            f"key heads of {width} make {rows}"
        )
    groups = fused.unflatten(0, (keys, group + 2, width))
    query, key, value = groups.split([group, 1, 1], dim=1)
    return query.flatten(0, 2).contiguous(), key.flatten(0, 2).clone(), value.flatten(0, 2).clone()


def convert_internlm2(source: str | Path, target: str | Path) -> LlamaConfig:
    """Write an InternLM2 folder as a Llama folder, one weight file after another.

    Args:
        source: folder with ``config.json`` and weights as ``.safetensors`` or ``.bin`` files.
        target: folder to write, with the same division into files; tokenizer files are left to
            the caller, since InternLM2's needs code of its own.

    Returns:
        The configuration written.

    Raises:
        ValueError: not an InternLM2 folder, or one without weights or with holes.
    """
    source, target = Path(source), Path(target)
    config = internlm2_config(json.loads((source / "config.json").read_text()))
    files = weight_files(source)
    target.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    size, dtype = 0, None
    for number, file in enumerate(files, start=1):
        renamed = from_internlm2(load_weights(file), config)
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(renamed, target / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(renamed, name))
        size += sum(tensor.numel() * tensor.element_size() for tensor in renamed.values())
        dtype = next(iter(renamed.values())).dtype if renamed else dtype
    check_complete(source, _names(config) - places.keys())  # no index: nobody loads the rest
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(target)
    return config


def _names(config: LlamaConfig) -> set[str]:
    """The tensors of a Llama, but for a head that is the embedding's."""
    with torch.device("meta"):
        names = set(LlamaForCausalLM(config).state_dict())
    return names - {"lm_head.weight"} if config.tie_word_embeddings else names
