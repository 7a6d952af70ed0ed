"""torch.compile: the decoder layers are one graph each, and give the same numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
CASES = [
    ({"layout": "natural"}, "left"),
    pytest.param({"layout": "released"}, "right", marks=pytest.mark.slow),
    pytest.param({"proxy_kind": "learned"}, "right", marks=pytest.mark.slow),
    pytest.param({"text": {"model_type": "phi3"}}, "left", marks=pytest.mark.slow),
    pytest.param({"text": {"model_type": "qwen3"}}, "right", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Layers share their code but not their number, so each is compiled by itself."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def batch_of(model, generator, side="right"):
    parts = ([2, "2", 3], [3, "1", 4], [5])
    return collate([sample(part, model.config, generator) for part in parts], side)


def compile_layers(model, backend="eager") -> None:
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend, fullgraph=True)


@pytest.mark.parametrize(("options", "side"), CASES)
def test_every_layer_is_one_graph_in_prefill_and_decoding(options, side, generator) -> None:
    model = tiny_model(start_layer=1, **{"text": {"num_hidden_layers": 3}, **options})
    inputs = batch_of(model, generator, side)
    chosen = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        cached = model(**inputs, use_cache=True).logits
        ids = model.generate(**inputs, **chosen)
        compile_layers(model)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, **CLOSE)
        torch.testing.assert_close(model(**inputs, use_cache=True).logits, cached, **CLOSE)
        assert model.generate(**inputs, **chosen).tolist() == ids.tolist()


@pytest.mark.slow
def test_training_through_compiled_layers(generator) -> None:
    plain, compiled = (tiny_model(start_layer=1).train() for _ in range(2))
    compile_layers(compiled)
    inputs = batch_of(plain, generator)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    for model in (plain, compiled):
        model(**inputs, labels=labels).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_the_language_model_is_one_graph_once_its_masks_are_made(generator) -> None:
    """Whether a batch is padded is asked once, before the layers; nothing breaks after that."""
    model = tiny_model(start_layer=1)
    language, seen = model.model.language_model, {}
    hook = language.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    inputs = batch_of(model, generator)
    with torch.no_grad():
        model(**inputs, use_cache=False)
        hook.remove()
        expected = language(**seen).last_hidden_state
        found = torch._dynamo.explain(language)(**seen)
        (reason,) = found.break_reasons
        assert "window.py" in str(reason.user_stack[-1])
        seen["attention_mask"] = None
        unpadded = language(**seen).last_hidden_state
        compiled = torch.compile(language, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**seen).last_hidden_state, unpadded, **CLOSE)
    assert expected.shape == unpadded.shape


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_inductor_gives_the_same_numbers(generator) -> None:
    model = tiny_model(start_layer=1)
    inputs = batch_of(model, generator)
    with torch.no_grad():
        expected = model(**inputs).logits
        compile_layers(model, backend="inductor")
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
