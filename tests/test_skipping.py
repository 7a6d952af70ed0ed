"""Layers that skip (``atn``, ``atn_ffn``): restated slowly, cached, trained, saved."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle, image_features, rms_norm, sees
from test_families import TEXT
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from proxyv import ProxyVConfig, ProxyVForConditionalGeneration
from proxyv.model.card import model_card
from proxyv.model.families import FAMILIES
from proxyv.model.parts import parameter_part
from proxyv.model.released import to_released_config
from proxyv.model.skipping import layer_that_skips
from proxyv.model.stage1 import load_stage1, save_stage1

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SKIPS = ("atn", "atn_ffn")


class SkippingOracle(Oracle):
    """The same layers token by token: an image token looks at itself alone, or at nothing."""

    def run_proxyv_layers(self, start, x, tokens, starts, shapes) -> Tensor:
        for index in range(start, self.text.num_hidden_layers):
            rows = []
            for number, token in enumerate(tokens):
                if token.kind != "full":
                    rows.append(self.attend(index, x, [number], tokens, sees)[0])
                elif self.config.skip == "atn":
                    alone = self.attend(index, x[number : number + 1], [0], [token], sees_itself)
                    rows.append(alone[0])
                else:
                    rows.append(self.light_mlp(index, x[number]))
            x = torch.stack(rows)
        return x

    def light_mlp(self, index: int, x: Tensor) -> Tensor:
        h = rms_norm(x, self.layer(index, "input_layernorm"), self.text.rms_norm_eps)
        h = F.silu(self.layer(index, "light_mlp.input_proj") @ h)
        return x + self.layer(index, "light_mlp.output_proj") @ h


def sees_itself(query, key) -> bool:
    return query is key


def skipping_model(skip: str, family: str = "llama", **options):
    text = {"model_type": family, "num_hidden_layers": 3, **TEXT[family]}
    return tiny_model(skip=skip, text=text, **{"start_layer": 1, **options})


def samples_of(model, generator):
    parts: tuple[list[int | str], ...] = ([2, "2", 3], [1, "1", 2, "1"])
    return [sample(part, model.config, generator) for part in parts]


def expected_logits(model, ids, images) -> Tensor:
    weights, tower = dict(model.named_parameters()), model.model.vision_tower
    features = [image_features(weights, tower, model.config, image) for image in images]
    return SkippingOracle(weights, model.config)(ids.tolist(), features)[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", sorted(TEXT))
@pytest.mark.parametrize("skip", SKIPS)
def test_a_padded_batch_equals_the_oracle(skip, family, side, attention, generator) -> None:
    model = skipping_model(skip, family, attention=attention)
    samples = samples_of(model, generator)
    inputs = collate(samples, side)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        cached = model(**inputs, use_cache=True).logits
        for row, (ids, images) in enumerate(samples):
            expected = expected_logits(model, ids, images)
            real, known = inputs["attention_mask"][row].bool(), ~expected.isnan().any(-1)
            torch.testing.assert_close(logits[row][real][known], expected[known], **CLOSE)
            torch.testing.assert_close(cached[row][real][known], expected[known], **CLOSE)


@pytest.mark.parametrize("start_layer", [0, 2])
@pytest.mark.parametrize("skip", SKIPS)
def test_released_positions_from_the_first_layer_to_the_last(skip, start_layer, generator) -> None:
    model = skipping_model(skip, start_layer=start_layer, layout="released")
    ids, images = samples_of(model, generator)[0]
    with torch.no_grad():
        logits = model(**collate([(ids, images)])).logits[0]
        expected = expected_logits(model, ids, images)
    known = ~expected.isnan().any(-1)
    torch.testing.assert_close(logits[known], expected[known], **CLOSE)


@pytest.mark.parametrize("skip", SKIPS)
def test_a_batch_equals_its_rows(skip, generator) -> None:
    model = skipping_model(skip)
    samples = samples_of(model, generator)
    inputs = collate(samples, "left")
    with torch.no_grad():
        together = model(**inputs).logits
        for row, one in enumerate(samples):
            alone = model(**collate([one])).logits[0]
            light = one[0] != IMAGE_TOKEN
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][real][light], alone[light], **CLOSE)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", sorted(TEXT))
@pytest.mark.parametrize("skip", SKIPS)
def test_generation_with_the_cache_equals_recomputation(skip, family, beams, generator) -> None:
    model = skipping_model(skip, family)
    inputs = collate(samples_of(model, generator), "left")
    chosen = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
    cached = model.generate(**inputs, **chosen)
    assert cached.tolist() == model.generate(**inputs, **chosen, use_cache=False).tolist()


@pytest.mark.parametrize("skip", SKIPS)
def test_an_image_in_a_later_turn_equals_one_pass(skip, generator) -> None:
    model = skipping_model(skip)
    ids, images = sample([2, "1", 3, "2", 4], model.config, generator)
    first = int((ids == IMAGE_TOKEN).nonzero()[0]) + model.config.rows_per_crop + 3
    with torch.no_grad():
        whole = model(**collate([(ids, images)])).logits[0]
        cache = model(**collate([(ids[:first], images[:1])]), use_cache=True).past_key_values
        later = collate([(ids[first:], images[1:])])
        later["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        rest = model(**later, past_key_values=cache).logits[0]
    light = ids[first:] != IMAGE_TOKEN
    torch.testing.assert_close(rest[light], whole[first:][light], **CLOSE)


def test_hidden_states_and_attentions_lose_no_layer(generator) -> None:
    model = skipping_model("atn_ffn", attention="eager")
    inputs = collate(samples_of(model, generator), "left")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    B, S = inputs["input_ids"].shape
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(B, S, 32)] * 4
    assert [tuple(x.shape) for x in outputs.attentions] == [(B, 4, S, S)] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("skip", SKIPS)
def test_gradients_flow_where_they_should(skip, checkpointing, generator) -> None:
    model = skipping_model(skip).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = collate(samples_of(model, generator))
    model(**inputs, labels=inputs["input_ids"].masked_fill(
        inputs["input_ids"] == IMAGE_TOKEN, -100)).loss.backward()  # fmt: skip
    frozen = model.freeze_unused()
    own = [n for n, _ in model.named_parameters() if parameter_part(n) == "proxyv"]
    if skip == "atn":
        assert own == frozen == []
    else:
        layers = "model.language_model.layers"
        names = ("light_mlp.input_proj.weight", "light_mlp.output_proj.weight")
        assert frozen == [f"{layers}.2.{name}" for name in names]
        assert own == [f"{layers}.{layer}.{name}" for layer in (1, 2) for name in names]
    for name, parameter in model.named_parameters():
        if ".vision_tower." in name:
            continue
        learns = parameter.grad is not None and float(parameter.grad.abs().max()) > 0
        assert learns == (name not in frozen), name
        assert parameter.requires_grad == (name not in frozen), name


def test_image_tokens_hand_no_gradient_to_what_they_skip(generator) -> None:
    """In the last layer they are keys and values only; before it, ``atn_ffn`` skips the FFN."""
    model = skipping_model("atn_ffn", start_layer=2)  # the last of three layers
    layer = model.model.language_model.layers[2]
    seen: list[int] = []
    for module in (layer.mlp, layer.self_attn.q_proj, layer.self_attn.o_proj, layer.light_mlp):
        module.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    keys: list[int] = []
    layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out.shape[1]))
    model(**collate([sample([2, "2", 3], model.config, generator)]))
    assert seen == [7, 7, 7]  # 5 text tokens and 2 newlines; the small MLP does not run at all
    assert sorted(keys) == [7, 32]


@pytest.mark.parametrize("skip", SKIPS)
def test_a_batch_without_images_runs_the_stock_layers(skip, generator) -> None:
    model = skipping_model(skip).train()
    ids = sample([6], model.config, generator)[0][None]
    baseline = tiny_model(text={"num_hidden_layers": 3}, start_layer=None)
    own = {k: v for k, v in model.state_dict().items() if "light_mlp" not in k}
    baseline.load_state_dict(own)
    outputs = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(outputs.logits, baseline(input_ids=ids).logits)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter_part(name) == "proxyv" and parameter.requires_grad:
            assert parameter.grad is not None and float(parameter.grad.abs().max()) == 0


@pytest.mark.parametrize("skip", SKIPS)
def test_a_saved_model_comes_back(skip, generator, tmp_path) -> None:
    model = skipping_model(skip)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.config.skip == skip
    inputs = collate(samples_of(model, generator), "left")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    config = ProxyVConfig.from_pretrained(tmp_path, skip=None)
    for loader in (ProxyVForConditionalGeneration, AutoModelForImageTextToText):
        for options in ({"skip": None}, {"config": config}):
            with pytest.raises(ValueError, match=rf"skip=None .* skip='{skip}'"):
                loader.from_pretrained(tmp_path, **options)
    assert "skip attention" in str(model_card(model.config, "x"))


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_pickled_model_comes_back(family, skip, generator) -> None:
    """Also where nobody has made the class of its layers before, as in another process."""
    model = skipping_model(skip, family)
    inputs = collate(samples_of(model, generator), "left")
    pickled, copied = pickle.dumps(model), copy.deepcopy(model)
    layer_that_skips.cache_clear()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(pickle.loads(pickled)(**inputs).logits, expected)
        assert torch.equal(copied(**inputs).logits, expected)


@pytest.mark.parametrize("loader", [ProxyVForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize("skip", SKIPS)
def test_proxies_do_not_become_layers_that_skip(skip, loader, tmp_path) -> None:
    tiny_model(start_layer=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"skip='{skip}' .* skip=None"):
        loader.from_pretrained(tmp_path, skip=skip)


def test_a_baseline_becomes_one_that_skips_with_fresh_small_mlps(tmp_path) -> None:
    tiny_model(text={"num_hidden_layers": 3}, start_layer=None).save_pretrained(tmp_path)
    torch.manual_seed(3)
    model = ProxyVForConditionalGeneration.from_pretrained(tmp_path, start_layer=1, skip="atn_ffn")
    mlp = model.model.language_model.layers[1].light_mlp
    assert tuple(mlp.input_proj.weight.shape) == (8, 32)  # a quarter of the width
    for layer, fan_in in ((mlp.input_proj, 32), (mlp.output_proj, 8)):
        largest = float(layer.weight.detach().abs().max())
        assert 0.8 * fan_in**-0.5 < largest <= fan_in**-0.5


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("skip", SKIPS)
def test_stage1_files(skip, suffix, tmp_path) -> None:
    path = tmp_path / f"stage1{suffix}"
    model, other = skipping_model(skip), skipping_model(skip, seed=1)
    model.config.layout = "released"  # all that a .bin can say
    save_stage1(model, path)
    load_stage1(other, path)
    for name, tensor in model.state_dict().items():
        if parameter_part(name) in ("projector", "newline", "proxyv"):
            assert torch.equal(other.state_dict()[name], tensor), name
    if skip == "atn_ffn":
        with pytest.raises(ValueError, match="light_mlp"):
            load_stage1(skipping_model(skip, start_layer=2), path)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"skip='atm' .*one of atn, atn_ffn"):
        tiny_config(skip="atm")
    with pytest.raises(ValueError, match=r"skip='atn' has no proxies, .*'learned'"):
        tiny_config(skip="atn", proxy_kind="learned")
    config = tiny_config(skip="atn", side_reduction=3)  # divides nothing, and need not
    assert config.num_proxies(config.side) == 0
    assert json.loads(config.to_json_string())["skip"] == "atn"
    with pytest.raises(ValueError, match="skip='atn' has no released form"):
        to_released_config(config, "anyres")
