"""Released names and ours: bit-equal there and back, and strict."""

from __future__ import annotations

import pytest
import torch
from tiny_models import IMAGE_TOKEN, load_released, tiny_config, tiny_model

from proxyv import ProxyVForConditionalGeneration
from proxyv.model.checkpoints import from_released, to_released
from proxyv.model.released import released_config


@pytest.mark.parametrize("start_layer", [None, 0, 2])
def test_round_trip(start_layer: int | None) -> None:
    model = tiny_model(start_layer=start_layer, layout="released")
    released = to_released(model.state_dict(), start_layer)
    other = ProxyVForConditionalGeneration(model.config)
    load_released(other, released)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    again = to_released(other.state_dict(), start_layer)
    assert again.keys() == released.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in released.items())


def test_released_names_and_shapes_are_the_documented_ones() -> None:
    model = tiny_model(start_layer=2)
    released = to_released(model.state_dict(), 2)
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items()}
    assert shapes["model.vision_mlp_layers.1.proj.0.weight"] == (16, 32)
    assert shapes["model.vision_mlp_layers.0.proj.2.weight"] == (32, 16)
    assert shapes["model.vision_mlp_layers.0.context_proj.weight"] == (16, 32)
    assert shapes["model.vision_mlp_layers.0.layernorm_post.weight"] == (32,)
    assert shapes["model.mm_projector.0.weight"] == (32, 16)
    assert shapes["model.mm_projector.2.bias"] == (32,)
    assert shapes["model.image_newline"] == (32,)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (60, 32)
    tower = "model.vision_tower.vision_tower.vision_model."
    assert shapes[tower + "embeddings.class_embedding"] == (16,)
    assert shapes[tower + "encoder.layers.1.self_attn.out_proj.weight"] == (16, 16)
    halves = from_released(released, 2)
    prefix = "model.language_model.layers.3.guided_update."
    whole = released["model.vision_mlp_layers.1.proj.0.weight"]
    assert torch.equal(halves[prefix + "merge_input.weight"], whole[:, :16])
    assert torch.equal(halves[prefix + "merge_context.weight"], whole[:, 16:])


def test_what_does_not_fit_is_named() -> None:
    model = tiny_model(start_layer=2)
    released = to_released(model.state_dict(), 2)
    released["model.layers.0.mystery.weight"] = torch.zeros(1)
    released["lm_head.weight"] = torch.zeros(61, 32)
    del released["model.norm.weight"], released["model.vision_mlp_layers.1.proj.2.weight"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_released(model, released)
    for word in (
        "2 missing: ",
        "model.language_model.norm.weight",
        "layers.3.guided_update.output_proj.weight",
        "1 unexpected: model.language_model.layers.0.mystery.weight",
        "lm_head.weight (61, 32) instead of (60, 32)",
    ):
        assert word in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (2, 1, ["holds 2 guided updates", "start_layer=2", "model has start_layer=1"]),
        (None, 1, ["holds 0 guided updates", "baseline", "start_layer=1"]),
        (3, None, ["holds 1 guided updates", "start_layer=3", "start_layer=None"]),
    ],
)
def test_another_start_layer_is_refused(theirs, ours, words) -> None:
    released = to_released(tiny_model(start_layer=theirs).state_dict(), theirs)
    with pytest.raises(ValueError) as error:
        load_released(tiny_model(start_layer=ours), released)
    for word in words:
        assert word in str(error.value)


def test_learned_proxies_go_by_the_released_names() -> None:
    model = tiny_model(start_layer=2, proxy_kind="learned", learned_proxies=3)
    released = to_released(model.state_dict(), 2)
    assert released["model.proxyv_initializer.proxyv_tokens"].shape == (3, 16)
    assert released["model.proxyv_initializer.Wk.weight"].shape == (16, 32)
    assert from_released(released, 2).keys() == model.state_dict().keys()
    other = ProxyVForConditionalGeneration(model.config)
    load_released(other, released)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"learned proxies, but .*proxy_kind='spatial'"):
        load_released(tiny_model(start_layer=2), released)
    spatial = to_released(tiny_model(start_layer=2).state_dict(), 2)
    with pytest.raises(ValueError, match=r"spatial proxies, but .*proxy_kind='learned'"):
        load_released(model, spatial)


@pytest.mark.parametrize(
    ("there", "gone"), [("merge_input", "merge_context"), ("merge_context", "merge_input")]
)
def test_half_of_a_pair_is_refused(there: str, gone: str) -> None:
    state = dict(tiny_model(start_layer=3).state_dict())
    del state[f"model.language_model.layers.3.guided_update.{gone}.weight"]
    with pytest.raises(ValueError, match=f"{there}.*{gone}"):
        to_released(state, 3)


RELEASED = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_grid_pinpoints": [[8, 16], [16, 8]],
    "proxyv": True,
    "proxyv_start_layer": 2,
    "proxyv_reduce_factor": 2,
}


def test_released_configuration() -> None:
    vision = tiny_config().vision_config.to_dict()
    config = released_config(RELEASED, vision)
    assert (config.start_layer, config.side_reduction, config.layout) == (2, 2, "released")
    assert config.image_grid_pinpoints == [[16, 8], [8, 16]]
    assert config.vision_feature_layer == -2
    assert config.image_token_index == 60
    text = config.text_config
    assert text.model_type == "llama"
    assert (text.hidden_size, text.num_key_value_heads, text.rms_norm_eps) == (32, 2, 1e-5)
    assert text.rope_parameters["rope_theta"] == 5000.0
    named = released_config(RELEASED, vision, image_token_index=IMAGE_TOKEN)
    assert named.image_token_index == IMAGE_TOKEN
    assert released_config({**RELEASED, "proxyv": False}, vision).start_layer is None
    stock = {key: value for key, value in RELEASED.items() if not key.startswith("proxyv")}
    with pytest.raises(ValueError, match="mm_patch_merge_type='spatial_unpad' without 'proxyv'"):
        released_config({**stock, "mm_patch_merge_type": "spatial_unpad"}, vision)
    qwen = released_config({**RELEASED, "model_type": "llava_qwen"}, vision)
    assert qwen.text_config.model_type == "qwen2"
    with pytest.raises(ValueError, match=r"'llava_mpt' .* llava_llama, llava_phi, llava_qwen"):
        released_config({**RELEASED, "model_type": "llava_mpt"}, vision)
    learned = released_config({**RELEASED, "learn_proxy": True, "per_crop_token_len": 16}, vision)
    assert (learned.proxy_kind, learned.learned_proxies, learned.proxies_per_crop) == (
        "learned",
        4,
        4,
    )
