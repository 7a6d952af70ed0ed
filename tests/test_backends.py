"""Every attention backend gives the same logits."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_flash_attention_says_what_is_missing() -> None:
    model = tiny_model(start_layer=1)
    with pytest.raises(ImportError, match=r"FlashAttention2.*installed"):
        model.set_attn_implementation("flash_attention_2")
    assert model.config.text_config._attn_implementation == "sdpa"


def flash_in_place_of_the_kernel(module, query, key, value, mask, **kwargs):
    """What flash attention computes: causal to the bottom right, rows padded by a 2-D mask."""
    Q, K = query.shape[2], key.shape[2]
    seen = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)[None, None]
    if mask is not None:
        assert mask.dim() == 2, "flash attention takes no mask of pairs"
        seen = seen & mask[:, None, None, :].bool()
        seen = seen | ~seen.any(-1, keepdim=True)
    return sdpa_attention_forward(module, query, key, value, seen, **kwargs)


@pytest.fixture(params=["flash_attention_2", "kernels-community/flash-attn2"])
def flash_model(request, monkeypatch):
    """A model whose ordinary layers call the function above under the name of a kernel.

    The second name is the one that transformers writes in place of the first where the package
    kernels is installed and flash-attn is not.
    """
    for functions, entry in (
        (ALL_ATTENTION_FUNCTIONS, flash_in_place_of_the_kernel),
        (ALL_MASK_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]),
    ):
        monkeypatch.setitem(functions._global_mapping, request.param, entry)

    def make(**options):
        model = tiny_model(start_layer=2, **options)
        model.config.text_config._attn_implementation_internal = request.param
        return model

    return make


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["spatial", "learned"])
def test_flash_attention_gets_no_mask_it_cannot_take(flash_model, kind, side, generator) -> None:
    model, plain = flash_model(proxy_kind=kind), tiny_model(start_layer=2, proxy_kind=kind)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [1, "1", 2], [4])]
    inputs = collate(rows, side)
    for use_cache in (False, True):
        ours = light_logits(model, inputs, use_cache=use_cache)
        expected = light_logits(plain, inputs, use_cache=use_cache)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    if side == "left":
        chosen = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
        generated = [m.generate(**inputs, **chosen).tolist() for m in (model, plain)]
        assert generated[0] == generated[1]


def test_flash_attention_is_refused_where_every_layer_needs_a_mask(flash_model, generator) -> None:
    model = flash_model(layout="released")
    inputs = collate([sample([2, "2", 3], model.config, generator)])
    with pytest.raises(ValueError, match=r"flash.*2' takes no masks.*'released'.*'sdpa'"):
        model(**inputs)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("layout", ["natural", "released"])
def test_bfloat16_stays_near_float32_on_every_backend(attention, layout, generator) -> None:
    model = tiny_model(start_layer=1, spread=0.05, layout=layout)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [1, "1", 2])]
    inputs = collate(rows, "left")
    exact = light_logits(model, inputs)
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):
        half = light_logits(model.to(torch.bfloat16), inputs)
    assert float((half.float() - exact).abs().max()) < 2e-2


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_every_backend_on_a_gpu(attention, side) -> None:
    """The real kernels, compiled where they are; heads as wide as flash attention needs them."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    text = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model(start_layer=1, spread=0.05, text=text, attention="eager").cuda()
    generator = torch.Generator().manual_seed(0)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [1, "1", 2], [4])]
    inputs = {name: values.cuda() for name, values in collate(rows, side).items()}
    exact = light_logits(model, inputs)
    model.set_attn_implementation(attention)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        if attention == "flash_attention_2" and dtype == torch.float32:
            continue  # its kernel has no float32
        model.to(dtype)
        for use_cache in (False, True):
            logits = light_logits(model, inputs, use_cache=use_cache)
            assert float((logits.float() - exact).abs().max()) < limit, (dtype, use_cache)
    if side == "left":
        assert model.generate(**inputs, max_new_tokens=3).is_cuda


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_gradients_on_a_gpu_are_those_of_sdpa(attention, generator) -> None:
    """Flex attention runs backward on a GPU only."""
    gradients = []
    for name in ("sdpa", attention):
        model = tiny_model(start_layer=1, attention=name).cuda().train()
        batch = collate([sample([2, "2", 3], model.config, torch.Generator().manual_seed(0))])
        inputs = {key: value.cuda() for key, value in batch.items()}
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-4, rtol=1e-3, msg=key)
