"""FLOPs of every token-reduction method against torch's counter, and the paper's settings."""

from __future__ import annotations

import copy

import pytest
import torch
from test_reduction_models import ARMS, CASES, METHODS
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from proxyv import ProxyVConfig
from proxyv.model.flops import RowTokens, kv_cache_bytes, paper_flops, run_flops
from proxyv.profiling.paper import PAPER_ROW


@pytest.mark.parametrize(("method", "arm"), CASES)
def test_formula_is_what_torch_counts(method, arm) -> None:
    """One crop, so that nothing is padded; eager attention, which the counter sees whole."""
    mapping = {"method": method.split(",")[0], **METHODS[method]}
    model = tiny_model(attention="eager", reduction=mapping, **ARMS[arm])
    inputs = collate([sample([4, "1", 7], model.config, torch.Generator().manual_seed(2))])
    images = model.get_image_features(inputs["pixel_values"])
    kept = images.grids[0].crop_tokens
    row = RowTokens(crops=1, text=11, kept=kept[0] if kept else None)
    # With gradients torch's attention module takes no fused path, which the counter cannot see.
    with FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    parts = run_flops(model.config, row)
    total = sum(parts.values())
    if method == "tokenpacker":  # on a CPU the counter sees nothing of fused attention
        total -= 4 * 16 * model.config.vision_config.hidden_size
    assert counter.get_total_flops() == total, (method, arm, IMAGE_TOKEN)


@pytest.mark.parametrize(("method", "arm"), CASES)
def test_a_decoding_step_and_the_cache_shrink_with_the_rows(method, arm) -> None:
    """After a reduced prompt every layer reads, and holds, the rows that its stage has left."""
    mapping = {"method": method.split(",")[0], **METHODS[method]}
    model = tiny_model(attention="eager", reduction=mapping, **ARMS[arm])
    inputs = collate([sample([4, "1", 7], model.config, torch.Generator().manual_seed(2))])
    kept = model.get_image_features(inputs["pixel_values"]).grids[0].crop_tokens
    row = RowTokens(crops=1, text=11, kept=kept[0] if kept else None)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == kv_cache_bytes(model.config, row, 4)
        step, seen = inputs["input_ids"][:, -1:], torch.ones(1, inputs["input_ids"].shape[1] + 1)
        told = model(input_ids=step, attention_mask=seen, past_key_values=copy.deepcopy(cache))
        with FlopCounterMode(display=False) as counter:
            found = model(input_ids=step, past_key_values=cache)
    # Rows that left are counted, whether a mask says so or not.
    torch.testing.assert_close(found.logits, told.logits)
    expected = run_flops(model.config, row.cached())
    assert counter.get_total_flops() == sum(expected.values())


def vicuna(**options) -> ProxyVConfig:
    text = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
              "patch_size": 14, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16}  # fmt: skip
    return ProxyVConfig(text_config=text, vision_config=vision, **options)


ZIP = {"method": "visionzip", "dominant": 360, "contextual": 40}
PYRAMID = {"method": "pyramiddrop", "layers": [12, 20, 26], "ratios": [0.5, 0.25, 0.125]}
LEARNED = {"start_layer": 12, "proxy_kind": "learned"}


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"reduction": ZIP}, 32),
        ({"reduction": PYRAMID}, 42),
        ({"reduction": ZIP, **LEARNED}, 62),
        ({"start_layer": 12}, 46),
    ],
)
def test_the_papers_settings_save_what_the_paper_says(options, saved) -> None:
    ours = 1 - paper_flops(vicuna(**options), PAPER_ROW) / paper_flops(vicuna(), PAPER_ROW)
    assert abs(100 * ours - saved) <= 2
