"""Fewer passes over memory, the same numbers: each function beside its plain form."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import collate, sample, tiny_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from proxyv.model import passes
from proxyv.model.passes import add_to, normalise, rotate


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("width", [8, 4])
def test_rotate_is_the_stock_function(grad, width):
    """With and without gradients, with a part of the head that is not turned, and strided rows."""
    heads = drawn(2, 5, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2).requires_grad_(grad)
    before = heads.detach().clone()
    angles = drawn(2, 5, width // 2).repeat(1, 1, 2)
    rope = (angles.cos(), angles.sin())
    turned, _ = apply_rotary_pos_emb(heads[..., :width], heads[..., :width], *rope)
    with torch.set_grad_enabled(grad):
        found = rotate(heads, rope)
    torch.testing.assert_close(found[..., :width], turned, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[..., width:], heads[..., width:])
    assert torch.equal(heads, before)
    assert found.requires_grad == grad


def test_addition_writes_over_what_it_owns_only_without_gradients():
    rows = drawn(2, 3)
    for grad, dtype, over in (
        (False, torch.float32, True),
        (True, torch.float32, False),
        (False, torch.bfloat16, False),
    ):
        owned = torch.ones(2, 3, dtype=dtype)
        with torch.set_grad_enabled(grad):
            total = add_to(owned, rows)
        torch.testing.assert_close(total, rows + 1, rtol=0, atol=0)
        assert (total.data_ptr() == owned.data_ptr()) == over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_norm_is_the_stock_one(dtype, monkeypatch):
    """The kernel that GPUs get, run here: forward, and gradients of rows and weight."""
    norm = LlamaRMSNorm(24, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1, 0.1)
    rows, once = drawn(2, 5, 24, dtype=dtype), 2**-7 if dtype == torch.bfloat16 else 1e-6
    results = []
    called: list[int] = []
    norm.register_forward_pre_hook(lambda module, args: called.append(1))
    for devices in (("cuda",), ("cpu",)):
        monkeypatch.setattr(passes, "FUSED_NORM_DEVICES", devices)
        given = rows.clone().requires_grad_()
        norm.zero_grad()
        out = normalise(norm, given)
        out.float().square().sum().backward()
        assert len(called) == 1  # by the first round, in which the module is asked
        results.append((out, given.grad, norm.weight.grad.clone()))
    for stock, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, stock, rtol=2 * once, atol=8 * once)


def test_norms_that_cannot_be_fused_are_called(monkeypatch):
    monkeypatch.setattr(passes, "FUSED_NORM_DEVICES", ("cpu",))
    norm = LlamaRMSNorm(24)
    rows = drawn(3, 24, dtype=torch.bfloat16)
    assert torch.equal(normalise(norm, rows), norm(rows))  # another type than the weight
    norm.weight.ds_id = 0  # DeepSpeed's mark
    called: list[int] = []
    norm.register_forward_pre_hook(lambda module, args: called.append(1))
    assert torch.equal(normalise(norm, drawn(3, 24)), norm(drawn(3, 24))) and len(called) == 2


@pytest.mark.parametrize("folded", [False, True])
def test_a_model_gives_the_same_without_gradients_and_with_a_fused_norm(folded, monkeypatch):
    model = tiny_model(start_layer=1).eval()
    if folded:
        model.fuse()
    inputs = collate([sample([4, "2", 5], model.config, torch.Generator().manual_seed(1))])
    plain = model(**inputs).logits.detach()
    with torch.no_grad():
        written_over = model(**inputs, use_cache=True).logits
        monkeypatch.setattr(passes, "FUSED_NORM_DEVICES", ("cpu",))
        fused = model(**inputs, use_cache=True).logits
    torch.testing.assert_close(written_over, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_fused_norm_leaves_offloaded_weights_to_their_hooks(monkeypatch):
    """Between calls they lie on the meta device; accelerate's hooks bring them at a call."""
    model = tiny_model(start_layer=1)
    inputs = collate([sample([4, "2", 5], model.config, torch.Generator().manual_seed(1))])
    plain = model(**inputs).logits
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.language_model.layers[1].input_layernorm.weight.is_meta
    monkeypatch.setattr(passes, "FUSED_NORM_DEVICES", ("cpu",))
    assert torch.equal(model(**inputs).logits, plain)
