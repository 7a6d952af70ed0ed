"""Every attention backend gives the same logits."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model
from torch.nn.attention.flex_attention import BlockMask

from proxyv.model.masks import to_backend

CASES = [
    {"layout": "natural"},
    {"layout": "released"},
    {"proxy_kind": "learned"},
    {"text": {"model_type": "phi3"}},
    {"text": {"model_type": "qwen2"}},
]


def light_logits(model, inputs, **options) -> torch.Tensor:
    """Logits of the text rows."""
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_TOKEN)
    with torch.no_grad():
        return model(**inputs, **options).logits[text]


def check_flex(options, side, generator) -> None:
    model = tiny_model(start_layer=1, **options)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [1, "1", 2])]
    inputs = collate(rows, side)
    expected = light_logits(model, inputs)
    model.set_attn_implementation("flex_attention")
    assert model.config.text_config._attn_implementation == "flex_attention"
    for use_cache in (False, True):
        logits = light_logits(model, inputs, use_cache=use_cache)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", CASES)
def test_flex_attention_uncompiled(options, side, generator) -> None:
    with torch.compiler.set_stance("force_eager"):
        check_flex(options, side, generator)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("layout", "side"), [("natural", "right"), ("released", "left")])
def test_flex_attention_compiled(layout, side, generator) -> None:
    torch._dynamo.reset()
    check_flex({"layout": layout}, side, generator)


def test_the_flex_mask_is_the_boolean_mask(generator) -> None:
    mask = torch.rand(2, 150, 300, generator=generator) < 0.5
    blocks = to_backend(mask, "flex_attention", torch.float32)
    assert isinstance(blocks, BlockMask) and blocks.shape == (2, 1, 150, 300)
    rows = torch.arange(150)[:, None], torch.arange(300)[None]
    for row in range(2):
        again = blocks.mask_mod(torch.tensor(row), torch.tensor(0), *rows)
        assert torch.equal(again, mask[row])
    assert blocks.to("meta").kv_num_blocks.is_meta
