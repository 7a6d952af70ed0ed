"""The cache that grows in place beside the stock one, whatever is done to both."""

from __future__ import annotations

import copy
import pickle
import weakref

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
        "growing": GrowingCache(config=CONFIG),
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


@pytest.mark.parametrize("kind", [DynamicCache, GrowingCache])
def test_the_first_keys_are_kept_and_not_copied(kind):
    cache = kind(config=CONFIG)
    keys, values = drawn(1, 3, 4, 8), drawn(1, 3, 4, 8)
    extend_cache(cache, keys, values, 1)
    assert isinstance(cache.layers[1], DynamicLayer)
    assert cache.layers[1].keys is keys and cache.layers[1].values is values
    again = extend_cache(cache, keys, values, 1)[0]
    assert again.shape[2] == 8 and torch.equal(keys, cache.layers[1].keys[:, :, :4])


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add"] * 4 + ["crop", "order", "repeat", "select", "copy", "reset"]),
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
        cache.crop(-min(rows, cache.get_seq_length()))
    elif step == "order":
        cache.reorder_cache(torch.arange(batch).flip(0))
    elif step == "repeat" and batch < 4:
        cache.batch_repeat_interleave(2)
    elif step == "select":
        cache.batch_select_indices(torch.arange(batch)[: max(1, batch // 2)])
    elif step == "reset":
        with torch.inference_mode():  # transformers 5.17 writes zeros over what is there
            cache.reset()
    return []


@given(STEPS)
def test_it_holds_what_the_stock_cache_holds(steps):
    """Turns of any length, beams, crops, copies that go their own way, and a reset."""
    pairs = [(GrowingCache(config=CONFIG), DynamicCache(config=CONFIG))]
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
        keys, values = layer.update(drawn(1, 3, 1, 8, seed=seed), drawn(1, 3, 1, 8))
        places |= {keys.data_ptr(), values.data_ptr()}
        held.append((keys, keys.clone()))
    layer.crop(-5)
    layer.update(drawn(1, 3, 2, 8), drawn(1, 3, 2, 8))
    assert len(places) == 2 * -(-200 // (ROOM + 1))
    assert all(torch.equal(keys, before) for keys, before in held)


@torch.no_grad()
def test_copies_of_a_layer_do_not_write_into_each_other():
    layer = GrowingLayer()
    for rows in (9, 1):
        layer.update(drawn(1, 3, rows, 8), drawn(1, 3, rows, 8))
    twins = [layer, copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    kept = [twin.update(*2 * [drawn(1, 3, 1, 8, seed=n)])[0] for n, twin in enumerate(twins)]
    for number, keys in enumerate(kept):
        expected = torch.cat([drawn(1, 3, rows, 8) for rows in (9, 1)], dim=2)
        expected = torch.cat([expected, drawn(1, 3, 1, 8, seed=number)], dim=2)
        assert torch.equal(keys, expected)


@torch.no_grad()
def test_memory_that_is_not_shown_any_more_is_free():
    """Beams take rows from elsewhere at every step: the rows before must not stay beside them."""
    layer = GrowingLayer()
    for rows in (9, 1):
        layer.update(drawn(4, 3, rows, 8), drawn(4, 3, rows, 8))
    before = [weakref.ref(layer.keys), weakref.ref(layer.values)]
    layer.batch_select_indices(torch.tensor([0]))
    assert [tensor() for tensor in before] == [None, None]
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_what_inference_mode_made_goes_on_without_it():
    layer = GrowingLayer()
    with torch.inference_mode():
        for rows in (9, 1):
            layer.update(drawn(1, 3, rows, 8), drawn(1, 3, rows, 8))
    with torch.no_grad():
        keys, values = layer.update(drawn(1, 3, 1, 8), drawn(1, 3, 1, 8))
    assert keys.shape == values.shape == (1, 3, 11, 8)


@pytest.mark.parametrize("shape", [(2, 3, 1, 8), (1, 1, 1, 8), (1, 3, 1, 1)])
@torch.no_grad()
def test_rows_of_another_shape_are_refused(shape):
    layer = GrowingLayer()
    for rows in (9, 1):
        layer.update(drawn(1, 3, rows, 8), drawn(1, 3, rows, 8))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(drawn(*shape), drawn(*shape))


@torch.no_grad()
def test_types_are_promoted_as_in_the_stock_layer():
    for make in (DynamicLayer, GrowingLayer):
        layer = make()
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32):
            keys, _ = layer.update(*2 * [drawn(1, 3, 1, 8).to(dtype)])
        assert keys.dtype == torch.float32 and keys.shape[2] == 4


@torch.no_grad()
def test_it_is_the_stock_layer_while_compiled():
    layer = GrowingLayer()
    for rows in (9, 1):
        layer.update(drawn(1, 3, rows, 8), drawn(1, 3, rows, 8))
    compiled = torch.compile(layer.update, backend="eager", fullgraph=True)
    keys, _ = compiled(drawn(1, 3, 1, 8), drawn(1, 3, 1, 8))
    assert keys.shape[2] == 11


def test_it_is_made_of_what_other_processes_gathered():
    """As torch's DataParallel does with what a model returns."""
    source = GrowingCache(config=CONFIG)
    for layer in range(2):
        source.update(drawn(1, 3, 4, 8), drawn(1, 3, 4, 8, seed=1), layer)
    again = GrowingCache(iter(source))
    assert again.get_seq_length() == 4 and type(again.layers[1]) is GrowingLayer
    assert torch.equal(again.layers[1].values, source.layers[1].values)


def test_gradients_pass_through():
    """With gradients it is the stock cache, also on rows that were appended without them."""
    found = []
    for cache in (GrowingCache(config=CONFIG), DynamicCache(config=CONFIG)):
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
    first, second = GrowingCache(config=config).layers
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
    assert type(ours.past_key_values) is GrowingCache
    assert {type(layer) for layer in ours.past_key_values.layers} == {GrowingLayer}
    assert theirs.past_key_values is stock
    assert {type(layer) for layer in stock.layers} == {DynamicLayer}


def test_a_forward_makes_one_and_an_assistant_drafts_with_it():
    model = tiny_model(start_layer=1)
    inputs = collate([sample([4, "2", 5], model.config, torch.Generator())])
    assert type(model(**inputs, use_cache=True).past_key_values) is GrowingCache
    options = {"max_new_tokens": 12, "do_sample": False}
    alone = model.generate(**inputs, **options)
    drafted = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(alone, drafted)


def test_another_kind_of_cache_is_left_as_asked_for():
    model = tiny_model()
    inputs = collate([sample([4, "2", 5], model.config, torch.Generator())])
    answer = model.generate(
        **inputs, max_new_tokens=2, cache_implementation="static", return_dict_in_generate=True
    )
    assert type(answer.past_key_values) is StaticCache


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cache_that_is_offloaded_stays_stock():
    model = tiny_model(start_layer=1).cuda()
    inputs = collate([sample([4, "2", 5], model.config, torch.Generator())])
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    answer = model.generate(**inputs, **options, cache_implementation="offloaded")
    assert type(answer.past_key_values) is DynamicCache and answer.past_key_values.offloading
    assert torch.equal(answer.sequences, model.generate(**inputs, **options).sequences)
