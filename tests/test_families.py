"""Every family of language models: against the oracle, cached, adapted, trained, refused."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, image_features
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model
from transformers import AutoModel

from proxyv.model.families import FAMILIES

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TEXT = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                 "partial_rotary_factor": 0.5}},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
}  # fmt: skip


def family_model(family: str, text: dict | None = None, **options):
    text = {"model_type": family, "num_hidden_layers": 3, **TEXT[family], **(text or {})}
    return tiny_model(text=text, **{"start_layer": 1, **options})


def batch_of(model, generator):
    samples = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [1, "1", 2, "1"])]
    return samples, collate(samples, "left")


def test_every_family_has_a_case() -> None:
    assert TEXT.keys() == FAMILIES.keys()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["natural", "released"])
@pytest.mark.parametrize("family", sorted(TEXT))
def test_a_padded_batch_equals_the_oracle(family, layout, attention, generator) -> None:
    model = family_model(family, layout=layout, attention=attention)
    samples, inputs = batch_of(model, generator)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        cached = model(**inputs, use_cache=True).logits
        for row, (ids, images) in enumerate(samples):
            weights, tower = dict(model.named_parameters()), model.model.vision_tower
            features = [image_features(weights, tower, model.config, image) for image in images]
            expected = Oracle(weights, model.config)(ids.tolist(), features)[0]
            real, known = inputs["attention_mask"][row].bool(), ~expected.isnan().any(-1)
            torch.testing.assert_close(logits[row][real][known], expected[known], **CLOSE)
            torch.testing.assert_close(cached[row][real][known], expected[known], **CLOSE)


@pytest.mark.parametrize("family", sorted(TEXT))
def test_generation_with_the_cache_equals_recomputation(family, generator) -> None:
    model = family_model(family)
    _, inputs = batch_of(model, generator)
    chosen = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    cached = model.generate(**inputs, **chosen)
    assert cached.tolist() == model.generate(**inputs, **chosen, use_cache=False).tolist()


@pytest.mark.parametrize("family", sorted(TEXT))
def test_generation_with_a_cache_of_fixed_size_is_the_same(family, generator) -> None:
    """Families with kinds of layers get their prepared masks as a dictionary, text alone too."""
    model = family_model(family)
    static = {"cache_implementation": "static", "disable_compile": True}
    for parts in (([2, "2", 3], [1, "1", 2, "1"]), ([5], [3])):
        inputs = collate([sample(list(each), model.config, generator) for each in parts], "left")
        chosen = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        expected = model.generate(**inputs, **chosen)
        assert torch.equal(model.generate(**inputs, **chosen, **static), expected)


@pytest.mark.parametrize("family", sorted(TEXT))
def test_the_baseline_is_the_stock_model_and_layers_keep_their_family(family) -> None:
    model = family_model(family).model.language_model
    stock = AutoModel.from_config(model.config).eval()
    own = {k: v for k, v in model.state_dict().items() if "guided_update" not in k}
    stock.load_state_dict(own)
    assert all(isinstance(layer, type(stock.layers[0])) for layer in model.layers)
    assert {type(layer).__name__ for layer in model.layers} == set(model._no_split_modules)
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, stock(ids).last_hidden_state)


@pytest.mark.parametrize("family", sorted(TEXT))
def test_hidden_states_and_attentions_lose_no_layer(family, generator) -> None:
    model = family_model(family, attention="eager")
    _, inputs = batch_of(model, generator)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    B, S = inputs["input_ids"].shape
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(B, S, 32)] * 4
    assert [tuple(x.shape) for x in outputs.attentions] == [(B, 4, S, S)] * 3


def test_adapters_on_the_fused_projection_are_not_bypassed(generator) -> None:
    peft = pytest.importorskip("peft")
    model = family_model("phi3")
    _, inputs = batch_of(model, generator)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        changed = adapted(**inputs).logits
        merged = adapted.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(merged, changed, **CLOSE)


@pytest.mark.parametrize("dropout", ["resid_pdrop", "attention_dropout"])
def test_dropouts_act_in_training_only(dropout, generator) -> None:
    model = family_model("phi3", text={dropout: 0.5})
    inputs = collate([sample([2, "1", 3], model.config, generator)])
    with torch.no_grad():
        still = family_model("phi3")(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, still)
        layers = model.model.language_model.layers
        layers[0].eval()  # an ordinary layer; what moves now comes from the ProxyV layers
        for layer in layers[1:]:
            layer.train()
        assert float((model(**inputs).logits - still).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_is_refused_where_images_need_all_rows(family) -> None:
    with pytest.raises(ValueError, match=r"sliding_window=8 .*null"):
        family_model(family, text={"sliding_window": 8})
    assert family_model(family, text={"sliding_window": 8}, start_layer=None)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"layout": "released"}, "layout to 'natural'"),
        ({"reduction": {"method": "fastv", "layer": 1}}, "reduction to null"),
        ({"reduction": {"method": "prumerge"}}, "reduction to null"),
    ],
)
def test_a_baseline_whose_masks_know_no_sliding_window_refuses_one(options, change) -> None:
    with pytest.raises(ValueError, match=rf"sliding_window=8 .*null, or {change}"):
        family_model("mistral", text={"sliding_window": 8}, start_layer=None, **options)
    assert family_model("mistral", text={"sliding_window": None}, start_layer=None, **options)


def test_a_reduction_before_the_decoder_leaves_a_sliding_window_in_force() -> None:
    logits = []
    for window in (6, None):
        model = family_model(
            "mistral", text={"sliding_window": window}, start_layer=None,
            reduction={"method": "average_pool", "block": 2},
        )  # fmt: skip
        inputs = collate([sample([3, "1", 12], model.config, torch.Generator().manual_seed(0))])
        with torch.no_grad():
            logits.append(model(**inputs, use_cache=False).logits[0])
    torch.testing.assert_close(logits[0][:6], logits[1][:6], **CLOSE)
    assert float((logits[0][-1] - logits[1][-1]).abs().max()) > 1e-2


@pytest.mark.parametrize("family", sorted(TEXT))
def test_every_parameter_learns(family, generator) -> None:
    model = family_model(family).train()
    inputs = collate([sample([2, "2", 3], model.config, generator)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.model.language_model.named_parameters():
        if "layers.2.guided_update" not in name:
            assert parameter.grad is not None, name
