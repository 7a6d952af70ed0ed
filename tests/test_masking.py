"""Masking vision tokens in the last layers: against the oracle, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, image_features
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_model

from proxyv.study.masking import masked_layers

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class MaskedOracle(Oracle):
    """The same model with the study's rule in its last layers, token by token."""

    def __init__(self, weights, config, number: int, hidden: str) -> None:
        super().__init__(weights, config)
        self.first, self.hidden = config.text_config.num_hidden_layers - number, hidden

    def attend(self, index, x, queries, tokens, rule):
        def masked(query, key):
            if query.kind == "full" and index >= self.first and query is not key:
                if self.hidden == "all" or key.kind == "full":
                    return False
            return rule(query, key)

        return super().attend(index, x, queries, tokens, masked)


def samples_of(model, generator):
    parts: tuple[list[int | str], ...] = ([2, "2", 3], [1, "1", 2, "2"])  # so the first is padded
    return [sample(part, model.config, generator) for part in parts]


def expected_logits(model, ids, images, number, hidden):
    weights, tower = dict(model.named_parameters()), model.model.vision_tower
    features = [image_features(weights, tower, model.config, image) for image in images]
    return MaskedOracle(weights, model.config, number, hidden)(ids.tolist(), features)[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["natural", "released"])
@pytest.mark.parametrize("hidden", ["vision", "all"])
@pytest.mark.parametrize("number", [1, 4])
def test_a_padded_batch_equals_the_oracle(
    number, hidden, layout, side, attention, generator
) -> None:
    model = tiny_model(start_layer=None, layout=layout, attention=attention)
    samples = samples_of(model, generator)
    inputs = collate(samples, side)
    with torch.no_grad():
        with masked_layers(model, number, hidden) as layers:
            logits = model(**inputs, use_cache=False).logits
            cached = model(**inputs, use_cache=True).logits
        assert layers == list(range(4 - number, 4))
        for row, (ids, images) in enumerate(samples):
            expected = expected_logits(model, ids, images, number, hidden)
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][real], expected, **CLOSE)
            torch.testing.assert_close(cached[row][real], expected, **CLOSE)


def test_the_mask_matters_and_is_gone_afterwards(generator) -> None:
    model = tiny_model(start_layer=None)
    inputs = collate(samples_of(model, generator), "left")
    with torch.no_grad():
        before = model(**inputs).logits
        with masked_layers(model, 0):
            torch.testing.assert_close(model(**inputs).logits, before)
        with masked_layers(model, 2):
            assert float((model(**inputs).logits - before).abs().max()) > 1e-2
        with pytest.raises(RuntimeError, match="on purpose"), masked_layers(model, 2):
            raise RuntimeError("on purpose")
        assert torch.equal(model(**inputs).logits, before)
    for module in model.modules():
        assert not module._forward_pre_hooks


def test_hiding_all_is_skipping_attention(generator) -> None:
    """Untrained, layers with ``skip="atn"`` are masked ordinary layers, to the light rows."""
    skipping = tiny_model(start_layer=1, skip="atn")
    baseline = tiny_model(start_layer=None)
    baseline.load_state_dict(skipping.state_dict())
    inputs = collate(samples_of(baseline, generator), "left")
    light = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_TOKEN)
    with torch.no_grad(), masked_layers(baseline, 3, "all"):
        masked, skipped = baseline(**inputs).logits, skipping(**inputs).logits
    torch.testing.assert_close(masked[light], skipped[light], **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_the_cache_equals_recomputation(cache, generator) -> None:
    model = tiny_model(start_layer=None)
    inputs = collate(samples_of(model, generator), "left")
    chosen = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with masked_layers(model, 3):
        again = model.generate(**inputs, **chosen, use_cache=False)
        cached = model.generate(**inputs, **chosen, cache_implementation=cache)
    assert cached.tolist() == again.tolist()
    assert cached.tolist() != model.generate(**inputs, **chosen).tolist()


def test_layers_whose_vision_tokens_are_no_queries_are_left_alone(generator) -> None:
    model = tiny_model(start_layer=2)
    inputs = collate(samples_of(model, generator), "left")
    with torch.no_grad():
        plain = model(**inputs).logits
        with masked_layers(model, 2) as layers:
            assert layers == []
            assert torch.equal(model(**inputs).logits, plain)
        with masked_layers(model, 3) as layers:
            assert layers == [1]
            assert float((model(**inputs).logits - plain).abs().max()) > 1e-3


def test_crops_of_fewer_tokens_are_masked_alike(generator) -> None:
    """A method before the decoder that leaves every crop as many tokens: only the tokens differ."""
    zipped = {"method": "visionzip", "dominant": 5, "contextual": 2}
    model = tiny_model(start_layer=None, reduction=zipped)
    inputs = collate(samples_of(model, generator), "left")
    skipping = tiny_model(start_layer=1, skip="atn", reduction=zipped)
    model.load_state_dict(skipping.state_dict())
    light = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_TOKEN)
    with torch.no_grad(), masked_layers(model, 3, "all"):
        torch.testing.assert_close(
            model(**inputs).logits[light], skipping(**inputs).logits[light], **CLOSE
        )


def test_stock_packing_hides_every_row_of_an_image_from_the_others() -> None:
    model = tiny_model(start_layer=None, packing="llava_next")
    ids = torch.randint(3, 50, (1, 30))
    model.config.image_grid_pinpoints = [[16, 32]]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 3, 16, 16, generator=generator)
    sizes = torch.tensor([[16, 32]])
    # A thumbnail of 16 tokens, then 4 rows of 8 tokens and a newline.
    ids = torch.cat([ids[:, :3], torch.full((1, 16 + 4 * 9), IMAGE_TOKEN), ids[:, 3:8]], dim=1)
    given = {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}
    with torch.no_grad():
        plain = model(**given).logits
        with masked_layers(model, 4, "vision"):
            first = model(**given).logits
            changed = pixels + 1 * (torch.arange(3) == 2)[None, :, None, None, None]
            second = model(**{**given, "pixel_values": changed}).logits
    assert float((first - plain).abs().max()) > 1e-3
    thumbnail = slice(3, 19)
    torch.testing.assert_close(second[:, thumbnail], first[:, thumbnail])
    assert float((second[:, -1] - first[:, -1]).abs().max()) > 1e-4


def test_what_cannot_be_masked_is_refused(generator) -> None:
    model = tiny_model(start_layer=None)
    with pytest.raises(ValueError, match="5 layers cannot be masked: the model has 4"):
        with masked_layers(model, 5):
            pass
    with pytest.raises(ValueError, match="hidden='text' is not known: use one of vision, all"):
        with masked_layers(model, 1, "text"):
            pass
    for method in ({"method": "fastv", "layer": 1}, {"method": "prumerge", "neighbours": 3}):
        with pytest.raises(ValueError, match=rf"'{method['method']}' drops rows on the way"):
            with masked_layers(tiny_model(start_layer=None, reduction=method), 1):
                pass
    ids, images = sample([2, "1", 3], model.config, generator)
    with torch.no_grad(), masked_layers(model, 1):
        cache = model(input_ids=ids[None, :2], use_cache=True).past_key_values
        later = collate([(ids[2:], images)])
        later["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        with pytest.raises(ValueError, match="on top of cached tokens"):
            model(**later, past_key_values=cache)
