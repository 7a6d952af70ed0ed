"""The loss from supervised rows alone equals the usual loss, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model
from torch import nn

from proxyv.model import head
from proxyv.model.head import LanguageHead, supervised_rows


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([0, 1, 3, 20]))
def test_chunks_change_nothing(seed, length, at_once):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, length, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, length), generator=generator)
    labels[torch.rand(3, length, generator=generator) < 0.5] = -100
    layer = LanguageHead(8, 11).double()
    gradients = []
    before = head.LOGITS_AT_ONCE
    for chunked in (True, False):
        rows = hidden.clone().requires_grad_()
        layer.zero_grad()
        if chunked:
            head.LOGITS_AT_ONCE = at_once * 11
            try:
                loss = layer(*supervised_rows(rows, labels))
                loss.backward()
            finally:
                head.LOGITS_AT_ONCE = before
        else:
            logits = layer(rows)[:, :-1].reshape(-1, 11).float()
            wanted = labels[:, 1:].reshape(-1)
            loss = nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
            loss.backward()
        gradients.append((loss.detach(), rows.grad, layer.weight.grad.clone()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_never_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 5 * 11)
    seen: list[int] = []
    plain = nn.functional.cross_entropy

    def watch(logits, *args, **kwargs):
        seen.append(len(logits))
        return plain(logits, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "cross_entropy", watch)
    layer = LanguageHead(8, 11)
    layer(torch.randn(12, 8, requires_grad=True), torch.arange(12) % 11).backward()
    assert seen == [5, 5, 2] * 2 or sorted(seen) == [2, 2, 5, 5, 5, 5]
    seen.clear()
    layer(torch.randn(6, 8), torch.arange(6))  # hardly more than a chunk
    assert seen == [5, 1]


def test_the_loss_of_half_precision_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    layer, targets = LanguageHead(8, 11).bfloat16(), torch.arange(300) % 11
    rows = torch.randn(300, 8, generator=generator).bfloat16()
    loss = layer(rows, targets)
    exact = nn.functional.cross_entropy(layer(rows).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)


def test_nothing_supervised_is_a_zero_with_gradients():
    layer = LanguageHead(8, 11)
    rows = torch.randn(2, 3, 8, requires_grad=True)
    loss = layer(*supervised_rows(rows, torch.full((2, 3), -100)))
    loss.backward()
    assert loss.item() == 0.0
    assert rows.grad.abs().sum() == layer.weight.grad.abs().sum() == 0


def test_loss_only_is_the_models_loss():
    model, generator = tiny_model(start_layer=1), torch.Generator().manual_seed(3)
    rows = [sample(parts, model.config, generator) for parts in ([3, "1", 6], [4], ["2", 9])]
    batch = collate(rows)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    plain = model(**batch)
    only = model(**batch, loss_only=True)
    assert only.logits is None
    torch.testing.assert_close(only.loss, plain.loss)
    halved = model(**batch, loss_only=True, num_items_in_batch=torch.tensor(2))
    count = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(halved.loss, plain.loss * count / 2)
    with pytest.raises(ValueError, match="loss_only=True needs labels"):
        model(**{**batch, "labels": None}, loss_only=True)


def batch_and_labels(model):
    generator = torch.Generator().manual_seed(3)
    batch = collate([sample([3, "1", 6], model.config, generator)])
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    return batch


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_keeps_the_head(tied):
    model = tiny_model(start_layer=1, tie_word_embeddings=tied)
    old = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(70)
    assert isinstance(model.lm_head, LanguageHead) and model.lm_head.out_features == 70
    assert torch.equal(model.lm_head.weight[:60], old)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    batch = batch_and_labels(model)
    only = model(**batch, loss_only=True).loss
    torch.testing.assert_close(only, model(**batch).loss)
    only.backward()
    assert model.lm_head.weight.grad.shape == (70, 32)


@pytest.mark.parametrize("how", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_the_loss_of_a_wrapped_head_is_that_of_its_logits(how):
    peft = pytest.importorskip("peft")
    model = tiny_model(start_layer=1)
    batch = batch_and_labels(model)
    plain = model(**batch, loss_only=True).loss
    config = {"r": 2, "target_modules": ["q_proj"], **how}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.normal_()
    only = wrapped(**batch, loss_only=True).loss
    torch.testing.assert_close(only, wrapped(**batch).loss)
    assert only.shape == () and float((only - plain).detach().abs()) > 0.01
    only.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters()
               if "lm_head" in n and p.requires_grad)  # fmt: skip
