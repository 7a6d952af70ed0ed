"""The cache that grows in place beside the stock one, whatever is done to both."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import collate, sample, tiny_model
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from proxyv.model.cache import ROOM, GrowingCache, GrowingLayer, extend_cache

CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=3, hidden_size=24)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def caches():
    """Caches of every kind, empty."""
    return {
        "layers known": DynamicCache(config=CONFIG),
        "layers made when met": DynamicCache(),
        "growing": GrowingCache(CONFIG),
        "static": StaticCache(config=CONFIG, max_cache_len=9),
    }


@pytest.mark.parametrize("kind", caches())
def test_a_cache_holds_what_update_would_have_put_there(kind):
    """A first turn, another one, and a crop, beside ``update`` itself."""
    ours, stock = caches()[kind], caches()[kind]
    for number, rows in enumerate((4, 1, 2)):
        for layer in range(2):
            keys, values = drawn(1, 3, rows, 8), drawn(1, 3, rows, 8) + 1
            found = extend_cache(ours, keys, values, layer)
            expected = stock.update(keys.clone(), values.clone(), layer)
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine, theirs)
        if number == 1 and kind != "static":
            ours.crop(-1)
            stock.crop(-1)
    assert ours.get_seq_length() == stock.get_seq_length()
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_the_first_keys_are_kept_and_not_copied():
    cache = DynamicCache(config=CONFIG)
    keys, values = drawn(1, 3, 4, 8), drawn(1, 3, 4, 8)
    extend_cache(cache, keys, values, 1)
    assert isinstance(cache.layers[1], DynamicLayer)
    assert cache.layers[1].keys is keys and cache.layers[1].values is values
    again = extend_cache(cache, keys, values, 1)[0]
    assert again.shape[2] == 8 and torch.equal(keys, cache.layers[1].keys[:, :, :4])


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "crop", "order", "repeat", "copy", "reset"]),
        st.integers(1, ROOM + 3),
        st.sampled_from(sorted(MODES)),
    ),
    max_size=14,
)


def take(cache, step, rows, seed):
    """Do one step to a cache; what ``update`` returned, if it was asked."""
    batch = 1 if cache.layers[0].keys is None else cache.layers[0].keys.shape[0]
    if step == "add":
        keys = drawn(batch, 3, rows, 8, seed=seed)
        return [cache.update(keys, keys + 1, layer) for layer in range(2)]
    if step == "crop":
        cache.crop(-min(rows, max(0, cache.get_seq_length() - 1)))
    elif step == "order":
        cache.reorder_cache(torch.arange(batch).flip(0))
    elif step == "repeat" and batch < 4:
        cache.batch_repeat_interleave(2)
    elif step == "reset" and rows % 4 == 0:
        cache.reset()
    return []


@given(STEPS)
def test_it_holds_what_the_stock_cache_holds(steps):
    """Turns of any length, beams, crops, copies that go their own way, and a reset."""
    pairs = [(GrowingCache(CONFIG), DynamicCache(config=CONFIG))]
    for seed, (step, rows, mode) in enumerate(steps):
        with MODES[mode]():
            if step == "copy" and len(pairs) < 3:
                pairs.append(copy.deepcopy(pairs[-1]))
            for number, (ours, stock) in enumerate(pairs):
                given_back = take(ours, step, rows, seed + 50 * number)
                for found, expected in zip(
                    given_back, take(stock, step, rows, seed + 50 * number), strict=True
                ):
                    assert all(map(torch.equal, found, expected))
        for ours, stock in pairs:
            assert ours.get_seq_length() == stock.get_seq_length()
            for mine, theirs in zip(ours.layers, stock.layers, strict=True):
                if stock.get_seq_length():
                    assert torch.equal(mine.keys, theirs.keys)
                    assert torch.equal(mine.values, theirs.values)


@torch.no_grad()
def test_rows_stay_where_they_are():
    """200 steps move the rows of the prompt four times, and nothing handed out is written over."""
    layer, places, held = GrowingLayer(), set(), []
    layer.update(drawn(1, 3, 9, 8), drawn(1, 3, 9, 8))
    for seed in range(200):
        keys, _ = layer.update(drawn(1, 3, 1, 8, seed=seed), drawn(1, 3, 1, 8))
        places.add(keys.data_ptr())
        held.append((keys, keys.clone()))
    assert len(places) == -(-200 // (ROOM + 1))
    assert all(torch.equal(keys, before) for keys, before in held)
    layer.crop(-5)
    again, _ = layer.update(drawn(1, 3, 2, 8), drawn(1, 3, 2, 8))
    assert again.shape[2] == 9 + 200 - 5 + 2 and again.data_ptr() == keys.data_ptr()


def test_gradients_pass_through():
    """With gradients it is the stock cache, also on rows that were appended without them."""
    found = []
    for cache in (GrowingCache(CONFIG), DynamicCache(config=CONFIG)):
        with torch.no_grad():
            for rows in (4, 1, 1):
                cache.update(drawn(1, 3, rows, 8), drawn(1, 3, rows, 8), 0)
        new = drawn(1, 3, 2, 8, seed=1).requires_grad_()
        loss = cache.update(new, new, 0)[0].square().sum()
        loss = loss + cache.update(3 * new, new, 0)[0].square().sum()
        loss.backward()
        found.append(new.grad)
    assert torch.equal(*found)


def test_sliding_windows_stay_stock():
    config = MistralConfig(
        num_hidden_layers=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )
    first, second = GrowingCache(config).layers
    assert type(first) is DynamicSlidingWindowLayer and type(second) is GrowingLayer


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_uses_it_and_answers_the_same(beams):
    model = tiny_model(start_layer=1)
    drawing = torch.Generator().manual_seed(3)
    inputs = collate(
        [sample(parts, model.config, drawing) for parts in ([4, "2", 5], [2, "1", 3])],
        side="left",
    )
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "return_dict_in_generate": True,
    }
    ours = model.generate(**inputs, **options)
    stock = DynamicCache(config=model.config.text_config)
    theirs = model.generate(**inputs, **options, past_key_values=stock)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert {type(layer) for layer in ours.past_key_values.layers} == {GrowingLayer}
    assert theirs.past_key_values is stock
    assert {type(layer) for layer in stock.layers} == {DynamicLayer}


def test_another_kind_of_cache_is_left_as_asked_for():
    model = tiny_model()
    inputs = collate([sample([4, "2", 5], model.config, torch.Generator())])
    answer = model.generate(
        **inputs, max_new_tokens=2, cache_implementation="static", return_dict_in_generate=True
    )
    assert type(answer.past_key_values) is StaticCache
