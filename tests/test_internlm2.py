"""InternLM2 weights as Llama's, against a plain statement of what InternLM2 computes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import rms_norm, rope
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from proxyv.model.internlm2 import convert_internlm2, from_internlm2, internlm2_config

RAW = {
    "model_type": "internlm2",
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    D, width, rows = 48, 8, 2 * (3 + 2) * 8
    state = {
        "model.tok_embeddings.weight": torch.randn(40, D),
        "model.norm.weight": torch.rand(D) + 0.5,
        "output.weight": torch.randn(40, D),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes = {
            "attention.wqkv.weight": (rows, D),
            "attention.wqkv.bias": (rows,),
            "attention.wo.weight": (D, 6 * width),
            "attention.wo.bias": (D,),
            "feed_forward.w1.weight": (56, D),
            "feed_forward.w3.weight": (56, D),
            "feed_forward.w2.weight": (D, 56),
        }
        state |= {prefix + name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        for name in ("attention_norm", "ffn_norm"):
            state[f"{prefix}{name}.weight"] = torch.rand(D) + 0.5
        state[prefix + "attention.rotary_emb.inv_freq"] = torch.zeros(4)
    return state


def internlm2(state: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits (S, vocabulary), head by head."""
    x = state["model.tok_embeddings.weight"][ids]
    positions, width, group = list(range(len(ids))), 8, 3
    for layer in range(2):

        def get(name, prefix=f"model.layers.{layer}."):
            return state[prefix + name]

        h = rms_norm(x, get("attention_norm.weight"), 1e-5)
        fused = h @ get("attention.wqkv.weight").T + get("attention.wqkv.bias")
        heads = []
        for head in range(6):
            first = (head // group) * (group + 2)  # where the head's group begins, in heads
            places = (first + head % group, first + group, first + group + 1)
            q, k, v = (fused[:, p * width : (p + 1) * width] for p in places)
            q, k = (rope(part[:, None], positions, 5000.0)[:, 0] for part in (q, k))
            scores = q @ k.T / math.sqrt(width)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ get("attention.wo.weight").T + get("attention.wo.bias")
        h = rms_norm(x, get("ffn_norm.weight"), 1e-5)
        gate, up = (h @ get(f"feed_forward.{name}.weight").T for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ get("feed_forward.w2.weight").T
    return rms_norm(x, state["model.norm.weight"], 1e-5) @ state["output.weight"].T


def test_the_converted_model_computes_what_internlm2_computes() -> None:
    state, config = weights(), internlm2_config(RAW)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(from_internlm2(state, config))
    ids = torch.randint(0, 40, (1, 17))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    torch.testing.assert_close(logits, internlm2(state, ids[0].tolist()), atol=1e-4, rtol=1e-4)


def test_configuration() -> None:
    config = internlm2_config(RAW)
    assert (config.model_type, config.attention_bias, config.mlp_bias) == ("llama", True, False)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert config.rope_parameters["rope_type"] == "dynamic"
    assert config.rope_parameters["factor"] == 2.0
    with pytest.raises(ValueError, match=r"'llama': expected 'internlm2'"):
        internlm2_config({**RAW, "model_type": "llama"})


def test_what_does_not_fit_is_named() -> None:
    config = internlm2_config(RAW)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wq\.weight is not"):
        from_internlm2({"model.layers.0.attention.wq.weight": torch.zeros(2)}, config)
    short = {"model.layers.0.attention.wqkv.weight": torch.zeros(72, 48)}
    with pytest.raises(ValueError, match=r"72 rows, but 6 query and 2 key heads of 8 make 80"):
        from_internlm2(short, config)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_in_several_files(kind, tmp_path) -> None:
    state = weights()
    source, target = tmp_path / "internlm2", tmp_path / "llama"
    source.mkdir()
    with pytest.raises(ValueError, match="no weights"):
        (source / "config.json").write_text(json.dumps(RAW))
        convert_internlm2(source, target)
    names = sorted(state)
    for number, part in enumerate((names[:9], names[9:])):
        tensors = {name: state[name] for name in part}
        if kind == "bin":
            torch.save(tensors, source / f"pytorch_model-{number}.bin")
        else:
            save_file(tensors, source / f"model-{number}.safetensors")
    convert_internlm2(source, target)
    model, report = LlamaForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(0, 40, (1, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    torch.testing.assert_close(logits, internlm2(state, ids[0].tolist()), atol=1e-4, rtol=1e-4)


def test_a_folder_with_holes_is_refused(tmp_path) -> None:
    state = weights()
    del state["model.layers.1.feed_forward.w3.weight"]
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        convert_internlm2(tmp_path, tmp_path / "llama")
