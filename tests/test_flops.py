"""The FLOPs formula against torch's counter, to the last operation, and the paper's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import collate, sample, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from proxyv import ProxyVConfig
from proxyv.model.flops import RowTokens, kv_cache_bytes, paper_flops, run_flops
from proxyv.profiling.paper import FUSED_QKV, PAPER, PAPER_ROW

CONFIGS = Path(__file__).parents[1] / "configs"
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"pad_token_id": 0, "rope_parameters": {"partial_rotary_factor": 0.5,
                                                   "rope_type": "default",
                                                   "rope_theta": 1e4}},
}  # fmt: skip
VARIANTS = {
    "baseline": {"start_layer": None},
    "from layer 0": {"start_layer": 0},
    "spatial": {"start_layer": 1},
    "last layer only": {"start_layer": 3},
    "learned": {"start_layer": 1, "proxy_kind": "learned"},
    "three learned, last only": {
        "start_layer": 3,
        "proxy_kind": "learned",
        "learned_proxies": 3,
    },
    "without attention": {"start_layer": 1, "skip": "atn"},
    "without attention and FFN": {"start_layer": 1, "skip": "atn_ffn"},
    "without attention and FFN in the last layer": {"start_layer": 3, "skip": "atn_ffn"},
    "released, average": {"layout": "released", "downsample": "average", "guided_ratio": 0.25},
}


def counted(model, parts, **kwargs) -> int:
    """What torch counts for one row."""
    inputs = collate([sample(parts, model.config, torch.Generator().manual_seed(0))])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_formula_is_what_torch_counts(family, variant):
    """One crop and several, two images, text alone; guided updates folded and not."""
    text = {"model_type": family, **FAMILIES[family]}
    model = tiny_model(attention="eager", text=text, **VARIANTS[variant])
    parts: list[int | str]
    for folded, parts in ((False, [5, "1", 9]), (False, [11]), (True, [4, "3", 2, "2", 7])):
        if folded:
            model.fuse()
        row = RowTokens(
            crops=sum(int(part) for part in parts if isinstance(part, str)),
            text=sum(part for part in parts if isinstance(part, int)),
        )
        expected = run_flops(model.config, row, folded=folded, head_rows=1)
        assert counted(model, parts, logits_to_keep=1) == sum(expected.values()), parts


def test_head_rows():
    model = tiny_model(attention="eager")
    row = RowTokens(crops=1, text=8)
    rows = model.config.rows_per_crop + 8
    expected = run_flops(model.config, row, head_rows=rows)
    assert counted(model, ["1", 8]) == sum(expected.values())


@pytest.mark.parametrize("start", [None, 1])
def test_a_decoding_step_costs_what_the_baseline_costs(start):
    model = tiny_model(attention="eager", start_layer=start)
    ids, images = sample([3, "2", 4], model.config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(**collate([(ids, images)]), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[None, -1:], past_key_values=cache)
    expected = run_flops(model.config, RowTokens(crops=0, text=1, past=len(ids)))
    assert counter.get_total_flops() == sum(expected.values())
    step = RowTokens(crops=0, text=1, past=len(ids))
    assert run_flops(model.config, step, causal=True) == expected  # it sees every row before it
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == kv_cache_bytes(model.config, RowTokens(0, 1, past=len(ids)), 4)


def test_causal_attention_is_counted_once():
    """Scores of a causal kernel: half of the square, its diagonal included."""
    config = tiny_config(start_layer=None)
    row = RowTokens(crops=2, text=6)
    rows = 2 * config.rows_per_crop + 6
    full, half = (run_flops(config, row, causal=causal) for causal in (False, True))
    pairs = rows * (rows - 1) // 2
    assert full["language_model"] - half["language_model"] == 4 * 4 * pairs * 32
    released = tiny_config(start_layer=1, layout="released")
    assert run_flops(released, row, causal=True) == run_flops(released, row)


def preset(name: str, start: int | None) -> ProxyVConfig:
    """Shape of a preset; the window of Phi-3 is off, as in the preset itself."""
    text = json.loads((CONFIGS / name / "language.json").read_text()) | {"sliding_window": None}
    vision = json.loads((CONFIGS / "vicuna-7b/vision.json").read_text())
    return ProxyVConfig(text_config=text, vision_config=vision, start_layer=start)


@pytest.mark.parametrize(
    ("name", "start"), [(name, start) for name, rows in PAPER.items() for start in rows]
)
def test_the_papers_column(name, start):
    fused = name in FUSED_QKV
    ours, baseline = (
        paper_flops(preset(name, layer), PAPER_ROW, fused_qkv=fused) for layer in (start, None)
    )
    assert abs(100 * (1 - ours / baseline) - PAPER[name][start].flops) <= 1


@pytest.mark.parametrize(
    ("skip", "start", "saved"),
    [
        *(("atn", 0, 17.7), ("atn", 12, 11.1), ("atn", 16, 8.8)),
        *(("atn_ffn", 0, 79.9), ("atn_ffn", 12, 50), ("atn_ffn", 16, 40)),
    ],
)
def test_the_papers_redundancy_study(skip, start, saved):
    """Tables 1 and 2 print 18, 11, 9 and 80, 50, 40 %."""
    config = preset("vicuna-7b", start)
    config.skip = skip
    ours, baseline = (paper_flops(c, PAPER_ROW) for c in (config, preset("vicuna-7b", None)))
    assert abs(100 * (1 - ours / baseline) - saved) < 0.1


def test_the_paper_formula_by_hand():
    """Section 2 of the paper's cost in its own letters, with widths that are all different."""
    config = tiny_config(start_layer=1)
    D, Dkv, ffn, h, layers = 32, 16, 48, 16, 4
    F, P, L = 2 * 16, 2 * 4, 2 + 7
    S = F + L
    linear = 2 * (2 * D**2 + 2 * D * Dkv + 3 * D * ffn)
    ordinary = S * linear + 4 * S**2 * D
    update = D * h + 2 * h * h + h * D  # into, merge of two of width h, out of it
    proxyv = 2 * F * 2 * D * Dkv + 2 * F * update + 2 * P * D * h
    proxyv += (P + L) * linear + 4 * (P + L) * (S + P) * D
    row = RowTokens(crops=2, text=7)
    assert paper_flops(config, row) == ordinary + (layers - 1) * proxyv
    again = 2 * (D**2 + 2 * D * Dkv)
    both = ordinary + S * again + (layers - 1) * (proxyv + 2 * F * D**2 + (P + L) * again)
    assert paper_flops(config, row, fused_qkv=True) == both


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="past=4"):
        RowTokens(crops=1, text=1, past=4)
    with pytest.raises(ValueError, match="text must not be negative"):
        RowTokens(crops=1, text=-1)
    stock = tiny_config(start_layer=None, packing="llava_next")
    with pytest.raises(ValueError, match="llava_next"):
        run_flops(stock, RowTokens(crops=1, text=1))
