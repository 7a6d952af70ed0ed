"""Every token-reduction method in whole models: batches, padding, backends, proxies, generation."""

from __future__ import annotations

import copy

import pytest
import torch
from test_inputs import media_batch, media_sample
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_config, tiny_model

from proxyv import ProxyVConfig, ProxyVForConditionalGeneration
from proxyv.model.crops import ImageGrid
from proxyv.model.image_spans import find_images
from proxyv.model.layout_builder import build_layout
from proxyv.reduction import CropTokens
from proxyv.reduction.rows import Rows

METHODS = {
    "fastv": {"layer": 2, "ratio": 0.6},
    "pyramiddrop": {"layers": [1, 2, 3], "ratios": [0.6, 0.4, 0.1]},
    "fitprune": {"scheme": [5, 4, 0, 0], "calibrated_tokens": 16},
    "visionzip": {"dominant": 5, "contextual": 2},
    "prumerge": {"plus": False, "neighbours": 3},
    "prumerge, more": {"plus": True, "ratio": 0.1, "neighbours": 3},
    "random_drop": {"tokens": 6},
    "average_pool": {"block": 2},
    "downsample": {"side": 2},
    "tokenpacker": {"scale": 2, "heads": 2},
}
GRIDS = ("average_pool", "downsample", "tokenpacker")
ARMS = {
    "baseline": {"start_layer": None},
    "learned": {"start_layer": 1, "proxy_kind": "learned", "learned_proxies": 3},
    "learned late": {"start_layer": 2, "proxy_kind": "learned", "learned_proxies": 3},
    "spatial": {"start_layer": 1},
    "skipping": {"start_layer": 1, "skip": "atn_ffn"},
}
CASES = [
    (method, arm)
    for method in METHODS
    for arm in ("baseline", "learned", "learned late", "spatial")
    if (arm != "spatial" or method in GRIDS)
    and (arm != "learned late" or method in ("fastv", "pyramiddrop", "prumerge"))
    and (arm != "learned" or method != "fitprune")
] + [("fitprune", "learned late")]
SKIPPING = [(method, "skipping") for method in ("pyramiddrop", "visionzip", "prumerge")]


def reduced(method: str, arm: str, **options):
    mapping = {"method": method.split(",")[0], **METHODS[method]}
    return tiny_model(reduction=mapping, **{**ARMS[arm], **options})


def samples(config: ProxyVConfig):
    """Two images with several crops, one with a single one, text alone; all of other lengths."""
    generator = torch.Generator().manual_seed(5)
    rows = [[3, "3", 2, "1", 4], [1, "2", 6], [7]]
    return [sample(row, config, generator) for row in rows]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("method", "arm"), CASES + SKIPPING)
@torch.no_grad()
def test_a_batch_is_its_samples_and_the_cache_changes_nothing(method, arm, attention) -> None:
    model = reduced(method, arm, attention=attention)
    rows = samples(model.config)
    single = [model(**collate([row])).logits[0] for row in rows]
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    answers = [model.generate(**collate([row]), **greedy)[0, -3:].tolist() for row in rows]
    for side in ("left", "right"):
        batch = collate(rows, side)
        logits = model(**batch).logits
        for row, (ids, _) in enumerate(rows):
            mine = logits[row][batch["attention_mask"][row].bool()]
            text = ids != IMAGE_TOKEN
            torch.testing.assert_close(mine[text], single[row][text], atol=2e-4, rtol=1e-4)
    batch = collate(rows, "left")
    assert model.generate(**batch, **greedy)[:, -3:].tolist() == answers
    assert model.generate(**batch, **greedy, use_cache=False)[:, -3:].tolist() == answers
    beams = {**greedy, "num_beams": 2}
    if attention == "sdpa":
        with_cache = model.generate(**batch, **beams)
        assert torch.equal(with_cache, model.generate(**batch, **beams, use_cache=False))


@pytest.mark.parametrize("arm", ["baseline", "learned", "learned late"])
@pytest.mark.parametrize(
    "mapping",
    [
        {"method": "fastv", "layer": 2, "ratio": 0.0},
        {"method": "pyramiddrop", "layers": [1, 2, 3], "ratios": [1.0, 1.0, 1.0]},
    ],
    ids=lambda mapping: mapping["method"],
)
@torch.no_grad()
def test_dropping_nothing_is_the_model_without_a_method(mapping, arm) -> None:
    plain = tiny_model(**ARMS[arm])
    model = tiny_model(reduction=mapping, **ARMS[arm])
    batch = collate(samples(model.config), "left")
    text = (batch["input_ids"] != IMAGE_TOKEN) & batch["attention_mask"].bool()
    ours, stock = (m(**batch, output_hidden_states=True) for m in (model, plain))
    torch.testing.assert_close(ours.logits[text], stock.logits[text], atol=1e-4, rtol=1e-4)
    assert len(ours.hidden_states) == len(stock.hidden_states)
    for mine, theirs in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(mine[text], theirs[text], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arm", ["learned", "learned late"])
@torch.no_grad()
def test_the_cache_holds_what_is_left_in_proxyv_layers_too(arm) -> None:
    """The layers behind the drop cache what is left: four crops of 16 tokens lose half."""
    model = tiny_model(reduction={"method": "fastv", "layer": 1, "ratio": 0.5}, **ARMS[arm])
    batch = collate(samples(model.config)[:2], "left")
    cache = model(**batch, use_cache=True).past_key_values
    length = batch["input_ids"].shape[1]
    lengths = [cache.get_seq_length(index) for index in range(4)]
    assert lengths == [length, length - 32, length - 32, length - 32]


@torch.no_grad()
def test_crops_of_several_lengths_take_no_rows_for_what_they_lack() -> None:
    model = reduced("prumerge, more", "learned")
    batch = collate(samples(model.config), "left")
    cache = model(**batch, use_cache=True).past_key_values
    images = model.get_image_features(batch["pixel_values"], num_crops=batch["num_crops"])
    kept = [sum(grid.crop_tokens) + grid.num_crops for grid in images.grids]
    assert cache.get_seq_length() == max(3 + 2 + 4 + kept[0] + kept[1], 1 + 6 + kept[2])


@pytest.mark.parametrize("name", ["input_ids", "inputs", None])
@torch.no_grad()
def test_the_last_row_of_the_prompt_judges_whatever_its_name(name) -> None:
    """Without a cache the answer is read with the prompt, but its rows do not judge."""
    options = {"method": "fastv", "layer": 1, "ratio": 0.7}
    model = tiny_model(reduction=options, **ARMS["learned late"])
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        batch = collate([sample([4, "2", 6], model.config, generator)])
        expected = model.generate(**batch, **greedy)
        ids = batch.pop("input_ids")
        args, named = ((ids,), {}) if name is None else ((), {name: ids})
        assert torch.equal(
            model.generate(*args, **named, **batch, **greedy, use_cache=False), expected
        )


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@torch.no_grad()
def test_crops_that_keep_every_patch_fill_their_rows_and_no_more(ratio) -> None:
    options = {"method": "prumerge", "plus": True, "ratio": ratio, "neighbours": 3}
    model = tiny_model(reduction=options, **ARMS["learned"])
    rows = samples(model.config)
    batch = collate(rows, "left")
    images = model.get_image_features(batch["pixel_values"], num_crops=batch["num_crops"])
    counts = [count for grid in images.grids for count in grid.crop_tokens]
    assert max(counts) == 16 and (ratio < 1 or min(counts) == 16)
    layout = model.model.embed(**batch)[1]
    roles = torch.zeros_like(batch["input_ids"])
    roles.scatter_add_(1, layout.full_index, layout.full_valid.long())
    roles.scatter_add_(1, layout.light_index, layout.light_valid.long())
    empty = torch.zeros_like(roles) if layout.empty is None else layout.empty.long()
    assert torch.equal(roles + empty, batch["attention_mask"]), "each row has one role"
    logits = model(**batch).logits
    torch.testing.assert_close(logits[:, -3:], model(**batch, use_cache=False).logits[:, -3:])
    for row, one in enumerate(rows):
        single = model(**collate([one])).logits[0, -3:]
        torch.testing.assert_close(logits[row, -3:], single, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["visionzip", "random_drop", "prumerge", "tokenpacker", "fastv"])
def test_the_class_token_is_no_patch(method) -> None:
    model = reduced(method, "learned", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r"gives 17 tokens a crop, expected 4\*\*2.*'full'"):
        model(**collate(samples(model.config)))


def test_more_tokens_than_rows_are_refused(monkeypatch) -> None:
    model = reduced("prumerge", "learned")
    monkeypatch.setattr(type(model.model.reduction), "reduce", lambda self, states: CropTokens(
        torch.ones(len(states.patches), 17, 16), torch.ones(len(states.patches), 17).bool(), None
    ))  # fmt: skip
    with pytest.raises(ValueError, match="left 17 tokens of a crop, for which 16 rows are"):
        model(**collate(samples(model.config)))


@torch.no_grad()
def test_a_second_question_continues_a_shorter_cache() -> None:
    model = reduced("prumerge", "learned")
    inputs = collate(samples(model.config)[:1])
    more = torch.randint(3, 50, (1, 4), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.ones_like(ids)
    images = {key: inputs[key] for key in ("pixel_values", "num_crops")}
    whole = model.generate(input_ids=ids, attention_mask=mask, **images, **options)
    going_on = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **options
    )
    assert whole.tolist() == going_on.tolist()


@pytest.mark.parametrize("arm", ["baseline", "learned late"])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "prumerge"])
@torch.no_grad()
def test_a_second_question_continues_a_cropped_cache(method, arm, generator) -> None:
    """Guessed tokens that were wrong are cropped off the cache, by a user's hand too."""
    model = reduced(method, arm)
    ids, images = sample([3, "2", 12], model.config, generator)
    ids[-12:] = torch.tensor([5, 6, 7, 8] * 3)  # repeats itself, so that there is much to guess
    inputs = collate([(ids, images)])
    more = torch.randint(3, 50, (1, 9), generator=generator)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def turns(cropped: int = 0, **guessing: int) -> list[int]:
        first = model.generate(**inputs, **options, **guessing, return_dict_in_generate=True)
        first.past_key_values.crop(-cropped)
        whole = torch.cat([first.sequences, more], dim=1)
        cache = {"attention_mask": torch.ones_like(whole), "past_key_values": first.past_key_values}
        return model.generate(input_ids=whole, **cache, **options)[0].tolist()

    assert turns(prompt_lookup_num_tokens=3) == turns()
    assert turns(cropped=4) == turns()


@pytest.mark.parametrize("arm", ["baseline", "learned late"])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "prumerge"])
@torch.no_grad()
def test_positions_may_begin_anywhere(method, arm) -> None:
    """Rotary positions are relative: no layer and no step may forget where they began."""
    model = reduced(method, arm)
    batch = collate(samples(model.config), "left")
    S, more = batch["input_ids"].shape[1], torch.full((3, 4), 9)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = []
    for start in (0, 7):
        given = {"position_ids": positions[:, :S] + start, "use_cache": True}
        cache = model(**batch, **given).past_key_values
        given = {"position_ids": positions[:, S:] + start, "past_key_values": cache}
        found.append(model(input_ids=more, attention_mask=mask, **given).logits)
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_gaps_between_positions_stay_where_the_image_decides() -> None:
    model = reduced("prumerge", "learned")
    batch = collate(samples(model.config)[:1])
    S = batch["input_ids"].shape[1]
    positions = torch.arange(S)[None]
    plain, even, wide = (
        model(**batch, position_ids=ids).logits[0, -4:]
        for ids in (None, positions, positions + 20 * (positions >= S - 4))
    )
    torch.testing.assert_close(even, plain, atol=2e-4, rtol=1e-4)
    assert float((wide - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "prumerge"])
@torch.no_grad()
def test_a_reduced_prompt_read_once_serves_several_continuations(method) -> None:
    model = reduced(method, "learned")
    rows = samples(model.config)
    batch = collate(rows, "left")
    tokens = torch.randint(3, 50, (6, 4), generator=torch.Generator().manual_seed(1))
    cache = model(**batch, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    mask = torch.nn.functional.pad(batch["attention_mask"].repeat_interleave(2, 0), (0, 4), value=1)
    chosen = torch.tensor([4, 1, 0])
    some = copy.deepcopy(cache)
    some.batch_select_indices(chosen)
    logits = model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits
    few = model(input_ids=tokens[chosen], attention_mask=mask[chosen], past_key_values=some).logits
    torch.testing.assert_close(few, logits[chosen], atol=2e-4, rtol=1e-4)
    for number in range(6):
        single = collate([rows[number // 2]])
        cache = model(**single, use_cache=True).past_key_values
        alone = model(
            input_ids=tokens[number : number + 1],
            attention_mask=torch.ones(1, single["input_ids"].shape[1] + 4, dtype=torch.long),
            past_key_values=cache,
        ).logits
        torch.testing.assert_close(logits[number], alone[0], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_shares_of_tokens_that_stay_stay_theirs(generator) -> None:
    """Between the first two ProxyV layers rows leave; each row left keeps its own splat row."""
    model = reduced("fastv", "learned")
    seen: list = []
    for layer in model.model.language_model.layers[1:3]:
        layer.guided_update.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    model(**collate([sample([3, "3", 4], model.config, generator)]))
    ((_, _, _, _, (shares,)), left), ((full, _, _, _, (kept,)), _) = seen
    same = (full[0][:, None] == left[0]).all(-1)  # (F', F) which row each one was
    real = same.any(-1)  # what only pads is none
    assert int(real.sum()) == int(0.4 * 48)
    own = shares.flatten(1, 2)[0][same[real].int().argmax(-1)]
    assert torch.equal(kept.flatten(1, 2)[0][real], own)


@torch.no_grad()
def test_proxies_begin_where_their_image_begins_once_rows_have_left(generator) -> None:
    """PyramidDrop counts positions anew, so those of the second image's proxies move too."""
    model = reduced("pyramiddrop", "learned")
    streams: list = []
    for layer in model.model.language_model.layers[1:]:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: streams.append(kwargs["streams"]), with_kwargs=True
        )
    model(**collate([sample([3, "1", 2, "1", 4], model.config, generator)]))
    firsts = []
    for each in streams[:2]:  # three proxies and so many full rows of each crop
        (group,) = each.layout.groups
        proxy, full = each.rope_main[1][0, 3], each.rope_full[1][0, group.crop_tokens]
        assert torch.equal(proxy, full)
        firsts.append(full)
    assert not torch.equal(*firsts)


@pytest.mark.parametrize("arm", ["baseline", "learned", "learned late"])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
@torch.no_grad()
def test_videos_beside_pictures_lose_rows_as_alone(method, arm, generator) -> None:
    model = reduced(method, arm)
    parts = ([2, "v3", 3], [1, "2", "v2", 4], [5], ["v2", 1, "1", 6])
    rows = [media_sample(row, model.config, generator) for row in parts]
    for side in ("left", "right"):
        batch = media_batch(rows, side)
        logits = model(**batch).logits
        for row, one in enumerate(rows):
            alone = model(**media_batch([one], side)).logits[0]
            text = one[0] != IMAGE_TOKEN
            mine = logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(mine[text], alone[text], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
@torch.no_grad()
def test_in_training_the_rows_before_answers_judge(method, generator) -> None:
    model = reduced(method, "baseline")
    batch = collate([sample([3, "2", 12], model.config, generator)])
    labels, judges = torch.full_like(batch["input_ids"], -100), torch.zeros(1, 49, dtype=torch.bool)
    for start in (41, 46):  # two answers of two tokens
        labels[0, start : start + 2] = batch["input_ids"][0, start : start + 2]
        judges[0, start - 1] = True
    given = model(**batch, labels=labels, judges=judges).logits[0, -12:]
    last = model(**batch, judges=torch.arange(49)[None] == 48).logits[0, -12:]
    own = model(**batch, labels=labels).logits[0, -12:]
    assert torch.equal(own, given) and not torch.allclose(own, last, atol=1e-3)


@pytest.mark.parametrize(("method", "arm"), CASES + SKIPPING)
def test_training_reaches_everything_that_trains(method, arm) -> None:
    model = reduced(method, arm).train()
    model.freeze_unused()
    batch = collate(samples(model.config), "right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    labels[:, :5] = -100
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("projector" in name or "proxy_initializer" in name):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if not name.endswith("bias"):  # a key's bias moves no softmax
                assert parameter.grad.any(), name


def test_training_with_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = reduced("pyramiddrop", "learned").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = collate(samples(model.config), "right")
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
        model(**batch, labels=labels).loss.backward()
        grads.append(model.model.multi_modal_projector.linear_1.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("method", ["tokenpacker", "prumerge", "pyramiddrop"])
@torch.no_grad()
def test_a_method_is_saved_with_the_model(method, tmp_path) -> None:
    model = reduced(method, "learned")
    model.save_pretrained(tmp_path)
    loaded = ProxyVForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.reduction == model.config.reduction
    batch = collate(samples(model.config))
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_a_saved_model_takes_another_method(tmp_path) -> None:
    tiny_model(**ARMS["baseline"]).save_pretrained(tmp_path)
    mapping = {"method": "fastv", **METHODS["fastv"]}
    loaded = ProxyVForConditionalGeneration.from_pretrained(tmp_path, reduction=mapping).eval()
    batch = collate(samples(loaded.config))
    expected = tiny_model(reduction=mapping, **ARMS["baseline"])(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "fastv"}, ["mapping", "'fastv'"]),
        ({"reduction": {"method": "fastw"}}, ["fastw", "did you mean 'fastv'"]),
        ({"reduction": {"method": "visionzip", "dominant": 5, "contextual": 2}},
         ["proxy_kind='spatial'", "visionzip", "proxy_kind='learned'", "average_pool"]),
        ({"reduction": {"method": "prumerge"}}, ["prumerge", "grid", "proxy_kind='learned'"]),
        ({"reduction": {"method": "fastv"}}, ["fastv", "grid"]),
        ({"reduction": {"method": "average_pool"}, "side_reduction": 4},
         ["side_reduction=4", "side of 2", "average_pool"]),
        ({"reduction": {"method": "fitprune", "scheme": [0, 0, 3, 0]}, "proxy_kind": "learned"},
         ["fitprune", "no queries", "start_layer=2", "fastv"]),
        ({"reduction": {"method": "fastv", "layer": 9}, "start_layer": None}, ["fastv.layer", "3"]),
        ({"reduction": {"method": "fastv"}, "start_layer": None, "packing": "llava_next"},
         ["packing='llava_next'", "fastv", "'crops'"]),
        ({"reduction": {"method": "fastv"}, "start_layer": None, "layout": "released"},
         ["layout='released'", "fastv", "'natural'"]),
        ({"reduction": {"method": "visionzip", "dominant": 4, "contextual": 0},
          "proxy_kind": "learned", "side_reduction": 4}, ["4 tokens no proxy", "learned_proxies"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(options, words) -> None:
    with pytest.raises(ValueError) as error:
        tiny_config(**options)
    for word in words:
        assert word in str(error.value)


def test_calls_that_cannot_be_are_refused() -> None:
    model = reduced("fastv", "baseline")
    batch = collate(samples(model.config), "left")
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match="'dynamic'"):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static")
    cache = model(**batch, use_cache=True).past_key_values
    again = torch.cat([batch["attention_mask"], batch["attention_mask"]], dim=1)
    with pytest.raises(ValueError, match="whole conversation at once"):
        model(**{**batch, "attention_mask": again}, past_key_values=cache)
    zipped = reduced("visionzip", "baseline")
    batch = collate(samples(zipped.config), "left")
    pools = torch.tensor([2, 1, 1])
    with pytest.raises(ValueError, match=r"pool_sizes.*visionzip.*pyramiddrop"):
        zipped(**batch, pool_sizes=pools)


@pytest.mark.parametrize(
    "mapping",
    [
        {"method": "average_pool", "block": 1},
        {"method": "downsample", "side": 4},
        {"method": "tokenpacker", "scale": 1, "heads": 2},
    ],
    ids=lambda mapping: mapping["method"],
)
@torch.no_grad()
def test_methods_that_leave_every_token_refuse_pooled_frames_as_others_do(mapping) -> None:
    model = tiny_model(reduction=mapping)
    frames = media_batch([media_sample(["v2", 3], model.config, torch.Generator())], "right")
    with pytest.raises(ValueError, match=rf"pool_sizes=\[2\] .*'{mapping['method']}'"):
        model(**frames)
    assert model(**collate(samples(model.config))).logits.isfinite().all()


def test_keeping_rows_of_a_layout_is_laying_out_what_is_left() -> None:
    """Dropping keeps every index pointing at the same token, whatever the padding."""
    config = tiny_config(**ARMS["learned"])
    generator = torch.Generator().manual_seed(0)
    for side in ("left", "right"):
        batch = collate(samples(config), side)
        image = batch["input_ids"] == IMAGE_TOKEN
        real = batch["attention_mask"].bool()
        grids = [ImageGrid(n, 4, n * 17) for n in batch["num_crops"].tolist()]
        layout = build_layout(find_images(image, grids), real, config.num_proxies)
        names = torch.randn(*real.shape, 1, generator=generator)
        drop = torch.rand(real.shape, generator=generator) < 0.5
        kept = real & ~(drop & layout.full_rows)
        rows, index = Rows.build(layout.full_rows & real, valid=real).keep(kept, False)
        left, chosen = layout.keep(kept, index)
        natural = names.gather(1, index[..., None])
        light, full = left.split(natural)
        before_light, before_full = layout.split(names)
        assert torch.equal(light[left.light_valid], before_light[layout.light_valid])
        stays = before_full.gather(1, chosen[..., None])
        assert torch.equal(full[left.full_valid], stays[left.full_valid])
        assert int(left.full_valid.sum()) == int((kept & layout.full_rows).sum())
        assert torch.equal(left.join(light, full)[rows.valid], natural[rows.valid])
        assert torch.equal(left.slots[rows.valid], layout.slots.expand_as(real).gather(1, index)[
            rows.valid])  # fmt: skip
        crops = left.full_valid.unflatten(1, (left.groups[0].num_crops, -1)).any(2)
        alive = left.without_empty_crops().proxy_valid.unflatten(1, (crops.shape[1], -1))
        assert torch.equal(alive.any(2), crops & layout.proxy_valid.unflatten(
            1, (crops.shape[1], -1)).any(2))  # fmt: skip
