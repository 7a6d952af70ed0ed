"""A configuration that does not fit the weights is refused in the configuration's own words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForImageTextToText

from proxyv import ProxyVForConditionalGeneration

LEARNED = {"proxy_kind": "learned", "learned_proxies": 3}
PHI3 = {"text": {"model_type": "phi3"}}
TOKENPACKER = {"method": "tokenpacker", "scale": 2, "heads": 2}


def edited(folder: Path, changes: dict, **options) -> Path:
    """A saved model whose ``config.json`` somebody has edited."""
    tiny_model(start_layer=1, **options).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        (config[part] if part else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"text_config.hidden_size": 64}, {}, ["text_config.hidden_size=64", "set it to 32"]),
        ({"text_config.vocab_size": 61}, {}, ["text_config.vocab_size=61", "set it to 60"]),
        ({"text_config.intermediate_size": 50}, {}, ["intermediate_size=50", "set it to 48"]),
        ({"text_config.intermediate_size": 50}, PHI3, ["intermediate_size=50", "set it to 48"]),
        ({"text_config.num_attention_heads": 8}, {}, ["num_attention_heads=8", "set it to 4"]),
        ({"text_config.num_key_value_heads": 4}, {}, ["num_key_value_heads=4", "set it to 2"]),
        ({"text_config.num_key_value_heads": 4}, PHI3, ["qkv_proj.weight is (64, 32)", "(96, 32)"]),
        ({"text_config.num_hidden_layers": 3}, {}, ["text_config.num_hidden_layers=3", "to 4"]),
        ({"text_config.num_hidden_layers": 5}, {}, ["text_config.num_hidden_layers=5", "to 4"]),
        ({"vision_config.num_hidden_layers": 1}, {}, ["vision_config.num_hidden_layers=1", "to 2"]),
        ({"vision_config.hidden_size": 32}, {}, ["vision_config.hidden_size=32", "set it to 16"]),
        ({"vision_config.patch_size": 2}, {}, ["vision_config.patch_size=2", "set it to 4"]),
        ({"vision_config.image_size": 32}, {}, ["vision_config.image_size=32", "set it to 16"]),
        ({"vision_feature_layer": [-1, -2]}, {}, ["linear_1.weight is (32, 16)", "(32, 32)"]),
        ({"guided_ratio": 0.25}, {}, ["guided_ratio=0.25", "set it to 0.5"]),
        ({"start_layer": 2}, {}, ["start_layer=2", "set it to 1"]),
        ({"start_layer": 0}, {}, ["start_layer=0", "set it to 1"]),
        ({"start_layer": None}, {}, ["start_layer=None", "set it to 1"]),
        ({"skip": "atn_ffn"}, {}, ["skip='atn_ffn'", "set it to None"]),
        ({"skip": None}, {"skip": "atn_ffn"}, ["skip=None", "set it to 'atn_ffn'"]),
        ({"proxy_kind": "learned"}, {}, ["proxy_kind='learned'", "set it to 'spatial'"]),
        ({"learned_proxies": 4}, LEARNED, ["learned_proxies=4", "set it to 3"]),
        (
            {"proxy_kind": "spatial", "learned_proxies": None},
            LEARNED,
            ["proxy_kind='spatial'", "set it to 'learned'"],
        ),
    ],
)
def test_an_edited_configuration_is_named(changes, options, words, tmp_path) -> None:
    folder = edited(tmp_path, changes, **options)
    with pytest.raises(ValueError) as error:
        ProxyVForConditionalGeneration.from_pretrained(folder)
    for word in [*words, str(folder)]:
        assert word in str(error.value)


def test_a_caller_may_still_ask_for_new_tensors_in_place_of_others(tmp_path) -> None:
    folder = edited(tmp_path, {"text_config.vocab_size": 61})
    model, report = ProxyVForConditionalGeneration.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.lm_head.weight.shape == (61, 32) and len(report["mismatched_keys"]) == 2


def without(folder: Path, holes: str) -> Path:
    """A saved model of which somebody has lost the tensors whose names match."""
    file = folder / "model.safetensors"
    state = load_file(file)
    left = {name: tensor for name, tensor in state.items() if not re.search(holes, name)}
    assert len(left) < len(state)
    save_file(left, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("holes", "options", "words"),
    [
        (r"multi_modal_projector", {}, ["4 tensors", "multi_modal_projector.linear_1.bias"]),
        (r"layers\.2\.guided_update\.context_proj", {}, ["1 tensors", "2.guided_update.context"]),
        (r"layers\.3\.guided_update", {}, ["6 tensors", "layers.3.guided_update"]),
        (r"image_newline", {"start_layer": None}, ["1 tensors", "(model.image_newline)"]),
        (r"lm_head", {}, ["1 tensors", "(lm_head.weight)"]),
        (r"embed_tokens", {"tie_word_embeddings": True}, ["model.language_model.embed_tokens"]),
        (r"multi_modal_projector", {"reduction": TOKENPACKER}, ["projector.attention"]),
        (r"projector.query_proj", {"reduction": TOKENPACKER}, ["1 tensors", "query_proj"]),
    ],
)
@pytest.mark.parametrize("loader", [ProxyVForConditionalGeneration, AutoModelForImageTextToText])
def test_weights_with_holes_are_refused(loader, holes, options, words, tmp_path) -> None:
    tiny_model(**{"start_layer": 1, "side_reduction": 1, **options}).save_pretrained(tmp_path)
    without(tmp_path, holes)
    with pytest.raises(ValueError) as error:
        loader.from_pretrained(tmp_path)
    for word in [*words, str(tmp_path), "incomplete", "whole checkpoint"]:
        assert word in str(error.value)


def test_a_projector_with_weights_of_its_own_may_start_anew_on_a_baseline(tmp_path) -> None:
    tiny_model(start_layer=None).save_pretrained(tmp_path)
    model, report = ProxyVForConditionalGeneration.from_pretrained(
        tmp_path, reduction=TOKENPACKER, start_layer=1, side_reduction=1, output_loading_info=True
    )
    new = {name for name in report["missing_keys"] if "projector" in name}
    assert new == {n for n, _ in model.named_parameters() if "projector" in n}
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"incomplete: 4 tensors .*linear_1"):  # and not back again
        ProxyVForConditionalGeneration.from_pretrained(tmp_path / "packed", reduction=None)
    without(tmp_path, "multi_modal_projector")
    with pytest.raises(ValueError, match=r"incomplete: \d+ tensors .*multi_modal_projector"):
        ProxyVForConditionalGeneration.from_pretrained(
            tmp_path, reduction=TOKENPACKER, start_layer=1, side_reduction=1
        )


def test_a_tied_head_is_not_missing(tmp_path) -> None:
    model = tiny_model(start_layer=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = ProxyVForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.get_input_embeddings().weight)
