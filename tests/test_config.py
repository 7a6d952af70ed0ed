"""The configuration refuses what cannot work and says what can."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config
from transformers import AutoConfig

from proxyv import ProxyVConfig


def test_defaults_are_a_baseline_with_the_papers_reduction() -> None:
    config = ProxyVConfig()
    assert config.start_layer is None
    assert (config.side_reduction, config.downsample, config.layout) == (4, "bilinear", "natural")
    assert (config.side, config.rows_per_crop, config.proxies_per_crop) == (24, 577, 36)


@pytest.mark.parametrize(
    ("width", "ratio", "expected"),
    [(4096, None, 1024), (1024, None, 256), (1016, None, 508), (64, None, 32), (64, 0.25, 16)],
)
def test_guided_width(width: int, ratio: float | None, expected: int) -> None:
    config = tiny_config(text={"hidden_size": width}, guided_ratio=ratio)
    assert config.guided_width == expected


def test_the_mlp_of_skipping_layers_has_a_quarter_of_any_width() -> None:
    assert tiny_config(text={"hidden_size": 64}, skip="atn_ffn").guided_width == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_layer": 4}, ["start_layer=4", "0 to 3", "null"]),
        ({"start_layer": -1}, ["start_layer=-1", "0 to 3"]),
        ({"start_layer": True}, ["start_layer=True"]),
        ({"start_layer": "2"}, ["start_layer='2'"]),
        ({"side_reduction": 3}, ["side_reduction=3", "4 tokens", "[1, 2, 4]"]),
        ({"side_reduction": 0}, ["side_reduction", "0"]),
        ({"proxy_kind": "magic"}, ["proxy_kind='magic'", "spatial, learned"]),
        ({"learned_proxies": 3}, ["learned_proxies=3", "proxy_kind 'learned'", "'spatial'"]),
        ({"proxy_kind": "learned", "learned_proxies": 0}, ["learned_proxies", "positive", "0"]),
        ({"proxy_kind": "learned", "side_reduction": 5}, ["side_reduction=5", "at most 4"]),
        ({"proxy_positions": "centre"}, ["proxy_positions='centre'", "consecutive, block"]),
        (
            {"proxy_positions": "block", "proxy_kind": "learned"},
            ["proxy_positions='block'", "use 'consecutive'"],
        ),
        ({"downsample": "nearest"}, ["downsample='nearest'", "bilinear, average"]),
        ({"layout": "old"}, ["layout='old'", "natural, released"]),
        ({"packing": "tight"}, ["packing='tight'", "crops"]),
        ({"guided_ratio": 0}, ["guided_ratio", "0"]),
        ({"guided_ratio": "half"}, ["guided_ratio", "'half'"]),
    ],
)
def test_bad_options_are_named_with_what_is_allowed(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        tiny_config(**options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["start_layers", "start_leyer", "side_reductions", "proxykind"])
def test_a_misspelt_option_is_no_baseline(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option '{name}': did you mean '"):
        tiny_config(**{name: 1})
    assert tiny_config(somebody_elses_key=1).somebody_elses_key == 1


def test_a_reduction_that_does_not_divide_is_fine_without_proxies() -> None:
    assert tiny_config(start_layer=None, side_reduction=3).start_layer is None


def test_learned_proxies_are_counted_by_the_reduction_or_by_hand() -> None:
    assert tiny_config(proxy_kind="learned", side_reduction=3).proxies_per_crop == 1
    assert tiny_config(proxy_kind="learned", learned_proxies=7).proxies_per_crop == 7


def test_round_trip_through_a_folder(tmp_path) -> None:
    config = tiny_config(layout="released", downsample="average", guided_ratio=0.25, start_layer=1)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ProxyVConfig)
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": loaded.name_or_path}
    assert type(loaded.text_config) is type(config.text_config)
    assert loaded.text_config.hidden_size == config.text_config.hidden_size
