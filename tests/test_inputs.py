"""Inputs of every kind, in a batch as alone: videos beside pictures, labels, states, sampling."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, image_features
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ROWS = [[2, "2", 3], [5], ["1", "3", 2], [4, "1"], ["2"], [1, "7", 1, "1", 2]]
KINDS = {"spatial": {}, "learned": {"proxy_kind": "learned", "learned_proxies": 3}}


def media_sample(parts, config, generator):
    """As ``sample``; "v3" is a video of three frames, pooled 2 x 2. Also the pools."""
    side, ids, images, pools = config.side, [], [], []
    for part in parts:
        video = isinstance(part, str) and part.startswith("v")
        if not video:
            more, pictures = sample([part], config, generator)
            ids.append(more)
            images += pictures
            pools += [1] * len(pictures)
            continue
        frames = int(part[1:])
        ids.append(torch.full((frames * ((side // 2) ** 2 + 1),), IMAGE_TOKEN))
        images.append(torch.randn(frames, 3, 16, 16, generator=generator))
        pools.append(2)
    return torch.cat(ids), images, pools


def media_batch(samples, side):
    batch = collate([(ids, images) for ids, images, _ in samples], side)
    pools = [pool for *_, own in samples for pool in own]
    if pools:
        batch["pool_sizes"] = torch.tensor(pools)
    return batch


def expected_logits(model, ids, images, pools):
    weights, tower = dict(model.named_parameters()), model.model.vision_tower
    features = [
        image_features(weights, tower, model.config, image, pool)
        for image, pool in zip(images, pools, strict=True)
    ]
    return Oracle(weights, model.config)(ids.tolist(), features)[0]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("layout", "side"), [("natural", "left"), ("released", "right")])
def test_videos_and_pictures_in_one_batch_equal_the_oracle(kind, layout, side, generator) -> None:
    model = tiny_model(start_layer=1, layout=layout, **KINDS[kind])
    rows = ([2, "v3", 3], [1, "2", "v2", 2], [4], ["1", 2], ["v1", "v4", "3", 1, "v2"])
    samples = [media_sample(parts, model.config, generator) for parts in rows]
    inputs = media_batch(samples, side)
    with torch.no_grad():
        for options in ({"use_cache": False}, {"use_cache": True}):
            logits = model(**inputs, **options).logits
            for row, one in enumerate(samples):
                real = inputs["attention_mask"][row].bool()
                expected = expected_logits(model, *one)
                known = ~expected.isnan().any(-1)
                torch.testing.assert_close(logits[row][real][known], expected[known], **CLOSE)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_video_of_32_frames(kind, generator) -> None:
    model = tiny_model(start_layer=1, text={"num_hidden_layers": 3}, **KINDS[kind])
    one = media_sample([3, "v32", 4], model.config, generator)
    inputs = media_batch([one], "right")
    assert inputs["input_ids"].shape == (1, 3 + 32 * 5 + 4)
    with torch.no_grad():
        expected = expected_logits(model, *one)
        known = ~expected.isnan().any(-1)
        torch.testing.assert_close(model(**inputs).logits[0][known], expected[known], **CLOSE)
    chosen = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    both = media_batch([one, media_sample([2, "1", 1], model.config, generator)], "left")
    got = model.generate(**both, **chosen)
    assert got[:1, -3:].tolist() == model.generate(**inputs, **chosen)[:, -3:].tolist()
    beams = model.generate(**both, **chosen, num_beams=2)[:1, -3:]
    assert beams.tolist() == model.generate(**inputs, **chosen, num_beams=2)[:, -3:].tolist()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_videos_train_every_new_module(kind, generator) -> None:
    model = tiny_model(start_layer=1, **KINDS[kind]).train()
    model.freeze_unused()
    samples = [media_sample(p, model.config, generator) for p in ([2, "v3", 3], [1, "2", 2])]
    inputs = media_batch(samples, "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "vision_tower" not in name:
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pool_sizes": torch.tensor([3])}, ["pool_sizes holds 3", "side of 4", "[1, 2, 4]"]),
        ({"pool_sizes": torch.tensor([4])}, ["side_reduction=2", "side of 1"]),
        ({"pool_sizes": torch.tensor([2, 2])}, ["pool_sizes=[2, 2]", "1 images"]),
        ({"pool_sizes": torch.tensor([1])}, ["34 consecutive image tokens"]),
    ],
)
def test_pools_that_do_not_fit_are_refused(change, words, generator) -> None:
    model = tiny_model(start_layer=1)
    inputs = media_batch([media_sample([1, "v2", 2], model.config, generator)], "right")
    with pytest.raises(ValueError) as error:
        model(**{**inputs, **change})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["natural", "released"])
def test_what_a_batch_gives_a_row_is_what_the_row_gets_alone(layout, side, generator) -> None:
    """Logits, loss, hidden states and attentions; ragged crops, text only, no text after."""
    model = tiny_model(start_layer=1, layout=layout, attention="eager")
    samples = [sample(parts, model.config, generator) for parts in ROWS]
    inputs = collate(samples, side)
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0), -100
    )
    first = inputs["attention_mask"].argmax(1)
    labels[torch.arange(len(ROWS)), first] = -100  # nothing stands before it that could say it
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        together = model(**inputs, labels=labels, **asked)
        losses, counts = [], []
        for row, one in enumerate(samples):
            real = inputs["attention_mask"][row].bool()
            single = collate([one])
            targets = labels[row][real][None]
            own = model(**single, labels=targets, **asked)
            torch.testing.assert_close(together.logits[row][real], own.logits[0], **CLOSE)
            for state, expected in zip(together.hidden_states, own.hidden_states, strict=True):
                torch.testing.assert_close(state[row][real], expected[0], **CLOSE)
            for weights, expected in zip(together.attentions, own.attentions, strict=True):
                kept = weights[row][:, real][:, :, real]
                torch.testing.assert_close(kept, expected[0], **CLOSE)
            supervised = int((targets[:, 1:] != -100).sum())
            if supervised:
                losses.append(own.loss * supervised)
                counts.append(supervised)
    torch.testing.assert_close(together.loss, sum(losses) / sum(counts))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep_in_a_padded_batch(side, generator) -> None:
    model = tiny_model(start_layer=1)
    inputs = collate([sample(parts, model.config, generator) for parts in ROWS], side)
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, logits[:, -3:])


def test_greedy_answers_in_a_batch_are_those_alone(generator) -> None:
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        model = tiny_model(start_layer=1)
        samples = [sample(parts, model.config, generator) for parts in ROWS]
        inputs = collate(samples, "left")
        length = inputs["input_ids"].shape[1]
        chosen = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, **options}
        got = model.generate(**inputs, **chosen)[:, length:]
        for row, one in enumerate(samples):
            single = collate([one])
            new = model.generate(**single, **chosen)[0, single["input_ids"].shape[1] :]
            assert new.tolist() == got[row].tolist(), (options, row)


def test_sampling_with_the_cache_is_sampling_without_it(generator) -> None:
    model = tiny_model(start_layer=1)
    inputs = collate([sample(parts, model.config, generator) for parts in ROWS], "left")
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        drawn.append(
            model.generate(**inputs, do_sample=True, top_p=0.9, max_new_tokens=5,
                           num_return_sequences=2, use_cache=use_cache)
        )  # fmt: skip
    assert drawn[0].tolist() == drawn[1].tolist()
    assert len({tuple(row) for row in drawn[0].tolist()}) > len(ROWS)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_model_spread_over_places_gives_the_same(tmp_path, generator) -> None:
    """Layers on disk stand for a second device: the streams pass through accelerate's hooks."""
    pytest.importorskip("accelerate")
    model = tiny_model(start_layer=1)
    model.save_pretrained(tmp_path / "model")
    inputs = collate([sample(parts, model.config, generator) for parts in ROWS], "left")
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.image_newline": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "cpu",
        "model.language_model.layers.2": "disk",
        "model.language_model.layers.3": "disk",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    for place in (device_map, "auto"):
        spread = type(model).from_pretrained(
            tmp_path / "model", device_map=place, offload_folder=tmp_path / "offload"
        )
        with torch.no_grad():
            torch.testing.assert_close(spread(**inputs).logits, model(**inputs).logits, **CLOSE)
