"""The whole model against the slow oracle, in batches, with padding, cached, saved, generating."""

from __future__ import annotations

import copy

import pytest
import torch
from draws import check_draws
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import Oracle, image_features
from test_families import TEXT
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_config, tiny_model
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from proxyv import ProxyVForConditionalGeneration
from proxyv.model.parts import parameter_part

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def oracle_logits(model, ids, images, weights=None, isolate_images=False):
    """Logits (S, vocabulary) of one unpadded sample; NaN for full rows of ProxyV models."""
    weights = dict(model.named_parameters()) if weights is None else weights
    tower = model.model.vision_tower
    features = [image_features(weights, tower, model.config, image) for image in images]
    oracle = Oracle(weights, model.config, isolate_images=isolate_images)
    return oracle(ids.tolist(), features)[0]


def assert_rows_match(logits, expected, limit=CLOSE) -> None:
    known = ~expected.isnan().any(-1)
    torch.testing.assert_close(logits[known], expected[known], **limit)


rows = st.lists(
    st.one_of(st.integers(1, 4), st.integers(1, 3).map(str)), min_size=1, max_size=4
).filter(lambda parts: any(isinstance(part, int) for part in parts))
batches = st.lists(rows, min_size=1, max_size=4).filter(
    lambda batch: any(isinstance(part, str) for row in batch for part in row)
)
options = st.fixed_dictionaries(
    {
        "family": st.sampled_from(sorted(TEXT)),
        # Most draws have a ProxyV layer that updates: hypothesis favours what comes first.
        "depth": st.integers(2, 4),
        "start": st.sampled_from([1, 0, 1, 0, 2, -1]),  # of the depth; -1 for the baseline
        "side_and_reduction": st.sampled_from(
            [(4, 2), (6, 3), (4, 1), (4, 4), (3, 1), (3, 3), (6, 2), (6, 6)]
        ),
        # The last two are numbers of learned proxies.
        "kind": st.sampled_from(["bilinear", "average", "block", 1, 3]),
        "layout": st.sampled_from(["natural", "released"]),
        "guided_ratio": st.sampled_from([None, 0.25]),
        "attention": st.sampled_from(["eager", "sdpa"]),
        "fused": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def drawn_model(chosen):
    """The random model that a draw of ``options`` describes."""
    depth, kind = chosen["depth"], chosen["kind"]
    side, reduction = chosen["side_and_reduction"]
    if kind == "block":
        how = {"proxy_positions": kind}
    elif isinstance(kind, str):
        how = {"downsample": kind}
    else:
        how = {"proxy_kind": "learned", "learned_proxies": kind}
    model = tiny_model(
        text={"num_hidden_layers": depth, "model_type": chosen["family"], **TEXT[chosen["family"]]},
        vision={"image_size": 4 * side},
        start_layer=None if chosen["start"] < 0 else chosen["start"] % depth,
        side_reduction=reduction,
        **how,
        **{name: chosen[name] for name in ("layout", "guided_ratio", "attention", "seed")},
    )
    if chosen["attention"] == "sdpa":  # eager's softmax is float32, whatever goes into it
        model.double()  # so that only mistakes are left to see, and rotary tables, also float32
    return model.fuse() if chosen["fused"] else model


def check_batch_against_oracle(batch, side, chosen) -> None:
    """Logits of a padded batch, cached and not, against the oracle sample by sample."""
    model = drawn_model(chosen)
    generator = torch.Generator().manual_seed(chosen["seed"])
    samples = [sample(parts, model.config, generator) for parts in batch]
    samples = [(ids, [image.to(model.dtype) for image in images]) for ids, images in samples]
    inputs = {n: x.to(model.dtype) if x.is_floating_point() else x
              for n, x in collate(samples, side).items()}  # fmt: skip
    limit = {**CLOSE, "atol": 1e-4} if model.dtype == torch.float32 else CLOSE
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        cached = model(**inputs, use_cache=True).logits
    for row, (ids, images) in enumerate(samples):
        real = inputs["attention_mask"][row].bool()
        with torch.no_grad():
            expected = oracle_logits(model, ids, images)
        assert_rows_match(logits[row][real], expected, limit)
        assert_rows_match(cached[row][real], expected, limit)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(batches, st.sampled_from(["left", "right"]), options)
@example(
    [[2, "3", 1], ["2", 3]],
    "left",
    {
        **{"family": "qwen2", "depth": 3, "start": 1, "side_and_reduction": (6, 3)},
        **{"kind": "block", "layout": "released", "guided_ratio": None, "attention": "sdpa"},
        **{"fused": True, "seed": 3},
    },
)
def test_a_padded_batch_equals_the_oracle_sample_by_sample(batch, side, chosen) -> None:
    check_batch_against_oracle(batch, side, chosen)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=250, deadline=None, derandomize=True)
@given(batches, st.sampled_from(["left", "right"]), options)
def test_many_padded_batches_equal_the_oracle(batch, side, chosen) -> None:
    check_batch_against_oracle(batch, side, chosen)


@pytest.mark.parametrize(
    "parts",
    [["1"], ["2", "1"], ["1", 3], [3, "1"], [2, "1", "2", 2, "1", 1], [1, "5", 1]],
    ids=["only", "adjacent", "first", "last", "three", "many"],
)
@pytest.mark.parametrize("layout", ["natural", "released"])
def test_where_images_stand(parts, layout, generator) -> None:
    model = tiny_model(layout=layout, start_layer=1)
    ids, images = sample(parts, model.config, generator)
    with torch.no_grad():
        logits = model(**collate([(ids, images)])).logits[0]
        assert_rows_match(logits, oracle_logits(model, ids, images))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "natural"},
        {"layout": "released"},
        {"proxy_kind": "learned", "learned_proxies": 3},
    ],
    ids=["natural", "released", "learned"],
)
def test_loss_and_gradients_equal_the_oracles(attention, options, generator) -> None:
    model = tiny_model(attention=attention, start_layer=1, **options).double().train()
    samples = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [3, "1", 4])]
    inputs = collate(samples)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0), -100
    )
    outputs = model(**inputs, labels=labels)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    losses = []
    for ids, images in samples:
        logits = oracle_logits(model, ids, [image.double() for image in images])
        targets = ids[1:].masked_fill(ids[1:] == IMAGE_TOKEN, -100)
        known = targets != -100
        losses.append(cross_entropy(logits[:-1][known], targets[known], reduction="none"))
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(outputs.loss, expected.float(), atol=1e-5, rtol=0)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(named.values()), allow_unused=True)
    for name, mine, other in zip(named, ours, theirs, strict=True):
        if other is None:
            assert mine is None or mine.abs().max() == 0, name
        else:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["spatial", "learned"])
def test_gradients_equal_finite_differences(kind, generator) -> None:
    """The slope of the loss along its gradient and some noise, for one part after another."""
    model = tiny_model(start_layer=1, proxy_kind=kind).double().train()
    samples = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [3, "1", 4])]
    inputs = collate(samples)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    targets = inputs["input_ids"].roll(-1, dims=1)
    known = (targets != IMAGE_TOKEN) & (targets != 0) & (inputs["input_ids"] != IMAGE_TOKEN)

    def loss() -> torch.Tensor:
        logits = model(**inputs, use_cache=False).logits[known]
        return torch.nn.functional.cross_entropy(logits, targets[known])

    model.zero_grad()
    loss().backward()
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            last = "." + name.rpartition(".")[0].rpartition(".")[2]
            part = parameter_part(name)
            groups.setdefault(part + (last if part == "proxyv" else ""), []).append(parameter)
    assert len(groups) == (13 if kind == "learned" else 11)
    step = 1e-3  # norms compute in float32 whatever the weights are
    for part, parameters in groups.items():
        length = torch.stack([p.grad.norm() for p in parameters]).norm()
        noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        directions = [
            p.grad / length + 0.1 * n / n.norm() for p, n in zip(parameters, noise, strict=True)
        ]
        slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
        with torch.no_grad():
            found = []
            for sign in (1, -2):
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(d, alpha=sign * step)
                found.append(loss())
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=step)
        torch.testing.assert_close(
            (found[0] - found[1]) / (2 * step), slope, rtol=5e-3, atol=1e-3, msg=part
        )


def test_num_items_in_batch_divides_the_summed_loss(generator) -> None:
    model = tiny_model()
    inputs = collate([sample([2, "1", 5], model.config, generator)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    with torch.no_grad():
        mean = model(**inputs, labels=labels).loss
        shared = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(24)).loss
    torch.testing.assert_close(shared, mean * 6 / 24)  # one of 7 texts has no row before it


def test_decoding_with_the_cache_equals_one_pass(generator) -> None:
    for layout in ("natural", "released"):
        model = tiny_model(start_layer=1, layout=layout)
        samples = [sample(parts, model.config, generator) for parts in ([2, "2", 6], [1, "1", 9])]
        inputs = collate(samples, "left")
        with torch.no_grad():
            whole = model(**inputs).logits
            head = {**inputs, "input_ids": inputs["input_ids"][:, :-4]}
            head["attention_mask"] = inputs["attention_mask"][:, :-4]
            cache = model(**head, use_cache=True).past_key_values
            length = inputs["input_ids"].shape[1]
            for column in range(length - 4, length):
                step = model(
                    input_ids=inputs["input_ids"][:, column : column + 1],
                    attention_mask=inputs["attention_mask"][:, : column + 1],
                    past_key_values=cache,
                    use_cache=True,
                )
                torch.testing.assert_close(step.logits[:, 0], whole[:, column], **CLOSE)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_equals_step_by_step_recomputation(attention, cache, generator) -> None:
    model = tiny_model(attention=attention, start_layer=1)
    samples = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [4], [1, "1", 2])]
    inputs = collate(samples, "left")
    length = inputs["input_ids"].shape[1]
    chosen = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    got = model.generate(**inputs, **chosen, cache_implementation=cache)[:, length:]
    recomputed = model.generate(**inputs, **chosen, use_cache=False)[:, length:]
    assert got.tolist() == recomputed.tolist()
    for row, one in enumerate(samples):
        alone = collate([one])
        single = model.generate(**alone, **chosen)[:, alone["input_ids"].shape[1] :]
        assert single[0].tolist() == got[row].tolist()


def test_beams_keep_the_images_of_a_row_together(generator) -> None:
    model = tiny_model(start_layer=1)
    samples = [sample(parts, model.config, generator) for parts in (["1", 1, "2", 2], [3, "1", 1])]
    inputs = collate(samples, "left")
    length = inputs["input_ids"].shape[1]
    chosen = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(**inputs, **chosen)[:, length:]
    for row, one in enumerate(samples):
        alone = collate([one])
        single = model.generate(**alone, **chosen)[:, alone["input_ids"].shape[1] :]
        assert single[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize(
    "reduction", [None, {"method": "fastv", "layer": 1, "ratio": 0.5}, {"method": "prumerge"}]
)
def test_generation_from_embeddings_is_that_from_ids(reduction, options, generator) -> None:
    model = tiny_model(start_layer=2, proxy_kind="learned", reduction=reduction)
    rows = [sample(parts, model.config, generator) for parts in (["1", 1, "2", 2], [3, "1", 1])]
    inputs = collate(rows, "left")
    chosen = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    expected = model.generate(**inputs, **chosen)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **chosen), expected[:, -4:])


def test_the_image_token_is_never_generated(generator) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[IMAGE_TOKEN] = 100 * model.lm_head.weight[IMAGE_TOKEN].abs()
    inputs = collate([sample([2, "1", 2], model.config, generator)])
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit equal, then the image token is pushed up
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(60))
        model.lm_head.bias[IMAGE_TOKEN] = 50.0
        assert int(model(**inputs).logits[0, -1].argmax()) == IMAGE_TOKEN
    length = inputs["input_ids"].shape[1]
    for chosen in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}):
        new = model.generate(**inputs, max_new_tokens=6, **chosen)[:, length:]
        assert IMAGE_TOKEN not in new


def test_a_second_turn_on_the_cache_equals_one_pass(generator) -> None:
    """Text after an image, then another image: its proxies see no earlier proxy."""
    for layout in ("natural", "released"):
        model = tiny_model(start_layer=1, layout=layout)
        ids, images = sample([2, "2", 3, "1", 4], model.config, generator)
        first = collate([(ids[:39], images[:1])])
        second = collate([(ids[39:], images[1:])])
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            second["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
            logits = model(**second, past_key_values=cache, use_cache=True).logits[0]
            expected = oracle_logits(model, ids, images, isolate_images=True)[39:]
        assert cache.get_seq_length() == len(ids)
        assert_rows_match(logits, expected)


def test_chat_goes_on_with_the_cache_and_a_new_image(generator) -> None:
    model = tiny_model(start_layer=1)
    ids, images = sample([2, "2", 3, "1", 4], model.config, generator)
    first, chosen = collate([(ids[:39], images[:1])]), {"do_sample": False, "max_new_tokens": 3}
    answer = model.generate(**first, **chosen, return_dict_in_generate=True)
    turn = torch.cat([answer.sequences[0], ids[39:]])
    inputs = {**collate([(ids, images[1:])]), "input_ids": turn[None]}
    inputs["attention_mask"] = torch.ones(1, len(turn), dtype=torch.long)
    past = answer.past_key_values.get_seq_length()
    assert past == len(answer.sequences[0]) - 1  # the last token was never fed
    with torch.no_grad():
        expected = oracle_logits(model, turn, images, isolate_images=True)[-1].argmax()
    got = model.generate(**inputs, **chosen, past_key_values=answer.past_key_values)
    assert int(got[0, len(turn)]) == int(expected)


@pytest.mark.parametrize("method", [None, "prumerge"])
def test_beams_go_on_with_the_cache_and_a_new_image(method, generator) -> None:
    """Of a cache whose samples were repeated for them; one of a reduced prompt takes no image."""
    reduction = None if method is None else {"method": method}
    model = tiny_model(start_layer=None, reduction=reduction)
    rows = [sample([1, "1", each, "2", 4], model.config, generator) for each in (3, 7)]
    whole = collate(rows, "left")
    openings = collate([(ids[:-38], images[:1]) for ids, images in rows], "left")
    for most in ({"num_beams": 3, "do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}):
        chosen = {"max_new_tokens": 4, "min_new_tokens": 4, **most}
        with torch.no_grad():
            cache = model(**openings, use_cache=True).past_key_values
        cache.batch_repeat_interleave(most["num_beams"])
        images = {name: whole[name][1::2] for name in ("pixel_values", "num_crops")}
        later = {**whole, **images, **chosen, "past_key_values": cache}
        if method is None:
            assert torch.equal(model.generate(**later), model.generate(**whole, **chosen))
            continue
        with pytest.raises(ValueError, match="reads images in the first prompt only"):
            model.generate(**later)


def test_a_stock_cache_of_another_batch_is_refused(generator) -> None:
    """Which knows nothing of what the model has noted on it."""
    model = tiny_model()
    one = collate([sample([2, "1", 1], model.config, generator)])
    cache = DynamicCache(config=model.config.text_config)
    model(**one, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    two = collate([sample(["1", 1], model.config, generator)] * 2)
    two["attention_mask"] = torch.ones(2, 20 + 18, dtype=torch.long)
    with pytest.raises(ValueError, match=r"batch of 1, now the batch is 2: .*GrowingCache"):
        model(**two, past_key_values=cache)


@torch.no_grad()
def test_a_prompt_read_once_serves_several_continuations(generator) -> None:
    """Its cache repeated, and samples of it selected, are caches of those samples."""
    model = tiny_model(start_layer=1)
    prompts = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [4, "1", 1])]
    turns = [sample([2, "1", 3], model.config, generator) for _ in range(4)]
    inputs = collate(prompts, "left")
    cache = model(**inputs, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    for kept in (torch.arange(4), torch.tensor([3, 0])):
        again = copy.deepcopy(cache)
        if len(kept) < 4:
            again.batch_select_indices(kept)
        batch = collate([turns[number] for number in kept])
        mask = torch.cat([inputs["attention_mask"][kept // 2], batch["attention_mask"]], dim=1)
        logits = model(**{**batch, "attention_mask": mask}, past_key_values=again).logits
        for row, number in enumerate(kept.tolist()):
            (ids, images), (new, pictures) = prompts[number // 2], turns[number]
            expected = oracle_logits(
                model, torch.cat([ids, new]), images + pictures, isolate_images=True
            )[len(ids) :]
            assert_rows_match(logits[row], expected)


@pytest.mark.parametrize("start_layer", [None, 1])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_mask_that_hides_image_tokens_is_refused(use_cache, start_layer, generator) -> None:
    model = tiny_model(start_layer=start_layer)
    inputs = collate(
        [sample([4], model.config, generator), sample([2, "2"], model.config, generator)]
    )
    inputs["attention_mask"][1, 6:12] = 0
    with pytest.raises(ValueError, match="hides 6 of the 34 image tokens from column 2 on"):
        model(**inputs, use_cache=use_cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_may_go_on_behind_the_rows(side, generator) -> None:
    """As long as a static cache, say; in the first turn and in a later one that brings an image."""
    model = tiny_model(start_layer=1)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 8], [1, "1", 2])]
    inputs = collate(rows, side)
    ids, images = sample([2, "1", 3], model.config, generator)
    more = collate([(ids, images), (ids, images)])
    logits = []
    for added in (0, 5):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, added))
        with torch.no_grad():
            first = model(**{**inputs, "attention_mask": mask}, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], more["attention_mask"]], dim=1)
            mask = torch.nn.functional.pad(mask, (0, added))
            second = model(
                **{**more, "attention_mask": mask}, past_key_values=first.past_key_values
            )
        logits += [(first.logits[inputs["attention_mask"].bool()], second.logits)]
    for plain, longer in zip(*logits, strict=True):
        assert torch.equal(plain, longer)


@pytest.mark.parametrize(
    "options",
    [
        {"skip": "atn"},
        {"skip": "atn_ffn"},
        {"start_layer": None},
        {"start_layer": None, "reduction": {"method": "visionzip", "dominant": 5, "contextual": 3}},
    ],
)
def test_where_proxies_sit_means_nothing_to_a_model_without_them(options, generator) -> None:
    models = [tiny_model(proxy_positions=kind, **options) for kind in ("consecutive", "block")]
    inputs = collate([sample([3, "2", 4], models[0].config, generator)])
    with torch.no_grad():
        assert torch.equal(*(model(**inputs).logits for model in models))


def test_text_only_batches(generator) -> None:
    model = tiny_model(start_layer=0)
    samples = [sample([n], model.config, generator) for n in (5, 3)]
    inputs = collate(samples)
    with torch.no_grad():
        logits = model(**inputs).logits
        empty = torch.zeros(0, 1, 3, 16, 16)
        same = model(**inputs, pixel_values=empty).logits
    assert torch.equal(logits, same)
    for row, (ids, _) in enumerate(samples):
        with torch.no_grad():
            assert_rows_match(logits[row, : len(ids)], oracle_logits(model, ids, []))


def test_inputs_embeds_in_place_of_ids(generator) -> None:
    model = tiny_model()
    inputs = collate([sample([2, "1", 3], model.config, generator)])
    with torch.no_grad():
        logits = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs, inputs_embeds=embeds).logits, logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_one_crop_may_come_without_a_crop_dimension(generator) -> None:
    model = tiny_model()
    inputs = collate([sample([2, "1", 3], model.config, generator)])
    with torch.no_grad():
        logits = model(**inputs).logits
        del inputs["num_crops"]
        inputs["pixel_values"] = inputs["pixel_values"][:, 0]
        assert torch.equal(model(**inputs).logits, logits)


def test_logits_to_keep(generator) -> None:
    model = tiny_model()
    inputs = collate([sample([2, "1", 3], model.config, generator)])
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
        chosen = model(**inputs, logits_to_keep=torch.tensor([0, 20])).logits
        torch.testing.assert_close(chosen, logits[:, [0, 20]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_crops": torch.tensor([3])}, ["num_crops=[3]", "at most 2 crops"]),
        ({"num_crops": torch.tensor([0])}, ["num_crops=[0]", "from 1 to 2"]),
        ({"num_crops": torch.tensor([1])}, ["17 image tokens more", "1 images"]),
        ({"pixel_values": None, "num_crops": None}, ["34 image tokens", "no pixel_values"]),
        ({"pixel_values": torch.zeros(3, 16, 16)}, ["pixel_values has shape (3, 16, 16)"]),
        ({"attention_mask": torch.ones(1, 4, 4)}, ["3 dimensions"]),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words, generator) -> None:
    model = tiny_model()
    inputs = {**collate([sample([2, "2", 3], model.config, generator)]), **change}
    with pytest.raises(ValueError) as error:
        model(**inputs)
    for word in words:
        assert word in str(error.value)


def test_features_that_do_not_fill_the_image_tokens_are_refused(generator) -> None:
    model = tiny_model()
    inputs = collate([sample([2, "2", 3], model.config, generator)])
    halves = torch.nn.AvgPool2d((2, 1))
    model.model.multi_modal_projector = torch.nn.Sequential(
        model.model.multi_modal_projector, halves
    )
    with pytest.raises(ValueError, match=r"\[18\] rows of features for \[34\] image tokens"):
        model(**inputs)


def test_saving_and_loading_by_the_auto_class(tmp_path, generator) -> None:
    model = tiny_model(start_layer=1)
    inputs = collate([sample([2, "2", 3], model.config, generator)])
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, ProxyVForConditionalGeneration)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    frozen = [n for n, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad] != []
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_layer": 2}, ["start_layer=2", "saved with start_layer=1"]),
        ({"start_layer": None}, ["start_layer=None", "saved with start_layer=1"]),
        ({"proxy_kind": "learned"}, ["proxy_kind='learned'", "proxy_kind='spatial'"]),
        ({"guided_ratio": 0.25}, ["guided_ratio=0.25", "guided_ratio=None"]),
        ({"side_reduction": 3}, ["side_reduction=3", "[1, 2, 4]"]),
    ],
)
def test_a_checkpoint_of_another_variant_is_refused(options, words, tmp_path) -> None:
    tiny_model(start_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        ProxyVForConditionalGeneration.from_pretrained(tmp_path, **options)
    for word in words:
        assert word in str(error.value)
    layout = {"start_layer": 1, "layout": "released"}  # what weights do not depend on
    loaded = ProxyVForConditionalGeneration.from_pretrained(tmp_path, **layout)
    assert loaded.config.layout == "released"


@pytest.mark.parametrize("load", [ProxyVForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize(
    ("option", "same", "other"), [("learned_proxies", 4, 3), ("guided_ratio", 0.5, 0.25)]
)
def test_a_number_that_followed_from_the_rest_may_be_named(
    option, same, other, load, tmp_path
) -> None:
    model = tiny_model(start_layer=1, proxy_kind="learned")
    model.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path, **{option: same})
    assert getattr(loaded.config, option) == same
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    for value in (other, "many"):
        with pytest.raises(ValueError, match=f"{option}={value!r} .*saved with {option}=None"):
            load.from_pretrained(tmp_path, **{option: value})
    loaded.save_pretrained(tmp_path / "named")
    again = load.from_pretrained(tmp_path / "named", **{option: None})
    assert getattr(again.config, option) is None


@pytest.mark.parametrize("load", [ProxyVForConditionalGeneration, AutoModelForImageTextToText])
def test_a_reduction_leaves_a_saved_model_its_learned_proxies(load, tmp_path, generator) -> None:
    """Built with half of the tokens a model has half of the proxies; a saved one keeps its own."""
    drop = {"method": "random_drop", "tokens": 8}
    assert tiny_config(proxy_kind="learned", reduction=drop).proxies_per_crop == 2
    model = tiny_model(start_layer=1, proxy_kind="learned")
    model.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path, reduction=drop)
    assert loaded.config.proxies_per_crop == model.config.proxies_per_crop == 4
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    inputs = collate([sample([2, "1", 3], loaded.config, generator)])
    counted = tiny_model(start_layer=1, proxy_kind="learned", learned_proxies=4, reduction=drop)
    counted.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, counted(**inputs).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = load.from_pretrained(tmp_path / "again")
    assert again.config.proxies_per_crop == 4 and again.config.reduction == loaded.config.reduction


@pytest.mark.parametrize("kind", ["spatial", "learned"])
def test_missing_weights_are_drawn_as_new_ones(kind, tmp_path) -> None:
    """A baseline folder loaded with a start layer: only the guided updates are new."""
    model = tiny_model(start_layer=None)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded, report = ProxyVForConditionalGeneration.from_pretrained(
        tmp_path, start_layer=1, proxy_kind=kind, output_loading_info=True
    )
    assert {parameter_part(name) for name in report["missing_keys"]} == {"proxyv"}
    for name, parameter in loaded.named_parameters():
        if name not in report["missing_keys"]:
            assert torch.equal(parameter, model.get_parameter(name))
    assert check_draws(loaded, ("proxyv",)) == len(report["missing_keys"])


@pytest.fixture
def backbones(tmp_path):
    torch.manual_seed(3)
    tiny = tiny_config()
    CLIPVisionModel(CLIPVisionConfig(**tiny.vision_config.to_dict())).save_pretrained(
        tmp_path / "vision"
    )
    language = LlamaForCausalLM(LlamaConfig(**tiny.text_config.to_dict()))
    language.to(torch.bfloat16).save_pretrained(tmp_path / "language")
    return tmp_path / "vision", tmp_path / "language"


def test_from_backbones(backbones) -> None:
    vision, language = backbones
    overrides = {"start_layer": 1, "side_reduction": 2, "image_token_index": IMAGE_TOKEN}
    build = ProxyVForConditionalGeneration.from_backbones
    torch.manual_seed(5)
    model = build(vision, language, config_overrides=overrides)
    torch.manual_seed(5)
    again = build(vision, language, config_overrides=overrides)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    stock = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(vision)
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)
    ids = torch.randint(0, 50, (2, 9))
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
        ours = model.model.vision_tower(pixels).last_hidden_state
        assert torch.equal(ours, tower(pixels).last_hidden_state)
    assert model.generation_config.eos_token_id == stock.generation_config.eos_token_id
    assert [n for n, p in model.named_parameters() if not p.requires_grad]
    check_draws(model)
    with pytest.raises(ValueError, match="start_layer=9"):
        build(vision, language, config_overrides={"start_layer": 9})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_autocast_trains_float32_weights_in_bfloat16(attention, generator) -> None:
    model = tiny_model(start_layer=1, spread=0.05, attention=attention).train()
    samples = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [3, "1", 4], [5])]
    inputs = collate(samples)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_TOKEN)
    exact = model(**inputs).logits[text].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs, labels=labels)
    assert float((outputs.logits[text].detach().float() - exact).abs().max()) < 2e-2
    outputs.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_adapters_on_the_projections_are_not_bypassed(generator) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(start_layer=1).double()  # float32 rounds so large adapters differently
    inputs = collate([sample([2, "1", 3], model.config, generator)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        plain = model(**inputs).logits
    names = ["k_proj", "merge_input", "context_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        changed = adapted(**inputs).logits
        merged = adapted.merge_and_unload()(**inputs).logits
    assert float((changed - plain).abs().max()) > 1e-3
    torch.testing.assert_close(merged, changed, **CLOSE)


def test_a_larger_vocabulary(generator) -> None:
    model = tiny_model()
    inputs = collate([sample([2, "1", 3], model.config, generator)])
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(64)
        after = model(**inputs).logits
    assert after.shape[-1] == model.config.text_config.vocab_size == 64
    torch.testing.assert_close(after[..., :60], before)


def test_the_image_token_may_lie_behind_the_vocabulary(generator) -> None:
    inside, behind = tiny_model(), tiny_model(image_token_index=60)
    inputs = collate([sample([2, "1", 3], inside.config, generator)])
    moved = {**inputs, "input_ids": inputs["input_ids"].masked_fill(
        inputs["input_ids"] == IMAGE_TOKEN, 60)}  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(behind(**moved).logits, inside(**inputs).logits)
    assert behind.generate(**moved, max_new_tokens=2).shape[0] == 1


def test_every_parameter_belongs_to_one_part() -> None:
    model = tiny_model()
    parts = {parameter_part(name) for name, _ in model.named_parameters()}
    assert parts == {"vision_tower", "projector", "newline", "proxyv", "language_model", "lm_head"}
    assert parameter_part("module.model.image_newline") == "newline"
    with pytest.raises(ValueError, match=r"'somewhere.weight'"):
        parameter_part("somewhere.weight")


def test_a_cache_object_can_be_handed_in(generator) -> None:
    model = tiny_model()
    inputs = collate([sample([2, "1", 3], model.config, generator)])
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        outputs = model(**inputs, past_key_values=cache)
    assert outputs.past_key_values is cache and cache.get_seq_length() == 22
