"""FastV and PyramidDrop against reference outputs; batches, padding and the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reduction_cases import golden_cases, read, settings_of, sister
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaModel,
    Phi3Config,
    Phi3Model,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)
from transformers.cache_utils import DynamicCache

from proxyv.reduction.attention import causal_rows, decoder_heads
from proxyv.reduction.base import DecoderReduction
from proxyv.reduction.decoding import run_reduced
from proxyv.reduction.fastv import FastV
from proxyv.reduction.prompt import choose_rows
from proxyv.reduction.pyramiddrop import PyramidDrop
from proxyv.reduction.rows import Rows, before_answers, select
from proxyv.reduction.stages import layer_stages

FASTV_SETTING = r"k(\d+)_r(\d+)\."  # K, and the percentage that is dropped


def tiny_llama(attention: str = "sdpa", key_heads: int = 4) -> LlamaModel:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=key_heads, intermediate_size=40,
        num_hidden_layers=6, vocab_size=40, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=256, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # attention that is far from uniform
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def golden_llama(path, name: str, attention: str) -> LlamaModel:
    model = tiny_llama(attention)
    model.load_state_dict(read(sister(path, name, "tinyllama")))
    return model


def one_image(length: int, start: int = 5, size: int = 24) -> Tensor:
    numbers = torch.arange(length)
    return ((numbers >= start) & (numbers < start + size))[None]


def run_golden(model, method: DecoderReduction, case: dict[str, Tensor], judges=None):
    """Prefill, then the decode rows one by one."""
    cache = DynamicCache(config=model.config)
    embeds = case["inputs_embeds"]
    rows = Rows.build(one_image(embeds.shape[1]), judges=judges)
    steps = []
    with torch.no_grad():
        hidden, left = run_reduced(model, method, embeds, rows=rows, past_key_values=cache)
        lengths = [cache.get_seq_length(i) for i in range(len(model.layers))]
        for step in case["decode_embeds"].split(1, dim=1):
            steps.append(run_reduced(model, method, step, past_key_values=cache)[0])
    return hidden, left, lengths, torch.cat(steps, dim=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("path", golden_cases("fastv"))
def test_fastv_golden(path, attention) -> None:
    model = golden_llama(path, "fastv", attention)
    for layer, percent in settings_of(path, FASTV_SETTING):
        case = read(path) | read(path, f"k{layer}_r{percent}.")
        method = FastV(layer=layer, ratio=percent / 100)
        hidden, left, lengths, decoded = run_golden(model, method, case)
        assert left.origin[0].tolist() == case["keep_index"].tolist() == left.positions[0].tolist()
        assert lengths == case["cache_lengths_after_prefill"].tolist()
        torch.testing.assert_close(hidden, case["last_hidden_state"], atol=1e-4, rtol=0)
        torch.testing.assert_close(decoded, case["decode_hidden"], atol=1e-4, rtol=0)


def pyramid_of(case: dict[str, Tensor]) -> PyramidDrop:
    """The method whose drops are those that a file's cache lengths show."""
    lengths = case["cache_lengths_after_prefill"].tolist()
    layers = [i for i in range(1, len(lengths)) if lengths[i] < lengths[i - 1]]
    size = int(one_image(lengths[0]).sum())
    return PyramidDrop(layers, [(lengths[i] - lengths[0] + size) / size for i in layers])


def kept_last(case: dict[str, Tensor]) -> list[int]:
    """Rows of the prompt left after all drops; each drop counts among those of the one before."""
    kept = torch.arange(case["inputs_embeds"].shape[1])
    for stage in range(sum(name[:5] == "stage" for name in case)):
        kept = kept[case[f"stage{stage}.kept_index"]]
    return kept.tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("path", golden_cases("pyramiddrop"))
def test_pyramiddrop_golden(path, attention) -> None:
    model = golden_llama(path, "pyramiddrop", attention)
    case = read(path)
    method = pyramid_of(case)
    hidden, left, lengths, decoded = run_golden(model, method, case)
    assert left.origin[0].tolist() == kept_last(case)
    last = f"prefill_position_ids.layer{method.layers[-1]}"
    assert left.positions.tolist() == case[last].tolist()
    assert lengths == case["cache_lengths_after_prefill"].tolist()
    torch.testing.assert_close(hidden, case["last_hidden_state"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, case["decode_hidden"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("path", golden_cases("pyramiddrop"))
def test_pyramiddrop_training_golden(path, attention) -> None:
    model = golden_llama(path, "pyramiddrop", attention)
    case = read(path) | read(path, "train.")
    hidden, left, _, _ = run_golden(model, pyramid_of(case), case, before_answers(case["labels"]))
    assert left.origin[0].tolist() == kept_last(case)
    assert case["labels"].gather(1, left.origin).tolist() == case["labels_out"].tolist()
    torch.testing.assert_close(hidden, case["last_hidden_state"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", golden_cases("pyramiddrop"))
def test_pyramiddrop_batch_golden(path) -> None:
    model = golden_llama(path, "pyramiddrop", "sdpa")
    case = read(path, "batch.")
    length = case["features"].shape[1]
    image = torch.cat(
        [one_image(length, int(s), int(n)) for s, n in zip(case["image_start"], case["image_len"],
                                                           strict=True)]
    )  # fmt: skip
    rows = Rows.build(image, valid=case["attention_mask"])
    rope = model.rotary_emb(case["features"], position_ids=rows.positions)
    method = pyramid_of(read(path))
    layer = model.layers[method.layers[0]]
    kept = choose_rows(method, 0, layer, case["features"], rope, rows)
    left, index = rows.keep(kept, renumber=True)
    assert torch.equal(left.valid, case["out_attention_mask"])
    features = case["features"].gather(1, index[..., None].expand(-1, -1, 32))
    features = features * left.valid[..., None]
    torch.testing.assert_close(features, case["out_features"], atol=1e-5, rtol=0)
    assert torch.equal(left.positions[left.valid], case["out_position_ids"][left.valid])


@pytest.mark.parametrize("path", golden_cases("fastv"))
def test_fastv_reads_the_attention_of_the_layer_before_golden(path) -> None:
    model = golden_llama(path, "fastv", "sdpa")
    embeds = read(path)["inputs_embeds"]
    rows = Rows.build(one_image(embeds.shape[1]))
    for number, percent in settings_of(path, FASTV_SETTING):
        layer, entering = model.layers[number - 1], []
        handle = layer.register_forward_pre_hook(lambda _, args, to=entering: to.append(args[0]))
        with torch.no_grad():
            model(inputs_embeds=embeds)
            handle.remove()
            rope = model.rotary_emb(embeds, position_ids=rows.positions)
            query, key = decoder_heads(layer, entering[0], rope, rows.queries)
            ours = causal_rows(query, key, rows, layer.self_attn.scaling)
        expected = read(path, f"k{number}_r{percent}.")["attn_last_token"]
        torch.testing.assert_close(ours[0, :, 0], expected, atol=1e-5, rtol=0)


def small_family(name: str):
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 40, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "phi3":
        return Phi3Model(Phi3Config(**sizes)).eval()
    if name == "qwen2":
        return Qwen2Model(Qwen2Config(**sizes)).eval()
    return Qwen3Model(Qwen3Config(**sizes, head_dim=8)).eval()


@pytest.mark.parametrize("family", ["phi3", "qwen2", "qwen3"])
def test_attention_computed_again_is_that_of_the_layer(family) -> None:
    model = small_family(family)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    embeds, image, valid = batch("left")
    rows = Rows.build(image, valid=valid)
    with torch.no_grad():
        weights = model(
            inputs_embeds=embeds, attention_mask=valid.long(), position_ids=rows.positions,
            output_attentions=True,
        ).attentions[0]  # fmt: skip
        rope = model.rotary_emb(embeds, position_ids=rows.positions)
        for index in (rows.queries, None):
            query, key = decoder_heads(model.layers[0], embeds, rope, index)
            ours = causal_rows(query[:, :, -1:], key, rows, model.layers[0].self_attn.scaling)
            torch.testing.assert_close(ours[:, :, 0], weights[:, :, -1], atol=1e-5, rtol=0)
        hidden, left = run_reduced(model, FastV(1, 0.5), embeds, rows=rows)
    assert left is not None and hidden.shape[:2] == left.valid.shape


# --- against a restatement that drops no row but hides it from later layers


def slow_run(model, embeds, image, plan, renumber, judges) -> tuple[list[int], Tensor]:
    """One sample through eager layers, all rows kept.

    Args:
        plan: layer before which rows go -> (layer whose attention decides, image rows to keep).
    """
    S = embeds.shape[0]
    alive, positions, weights = list(range(S)), torch.arange(S)[None], None
    hidden = embeds[None]

    def attend(layer) -> tuple[Tensor, dict]:
        mask = torch.full((1, 1, S, S), torch.finfo(hidden.dtype).min)
        for i in range(S):
            for j in range(i + 1):
                if j in alive or j == i:
                    mask[0, 0, i, j] = 0
        rope = model.rotary_emb(hidden, position_ids=positions)
        given_mask = {"attention_mask": mask, "position_embeddings": rope}
        return layer.self_attn(layer.input_layernorm(hidden), **given_mask)[1][0], given_mask

    for index, layer in enumerate(model.layers):
        if index in plan:
            scoring, keep = plan[index]
            if scoring == index:
                weights, _ = attend(layer)
            assert weights is not None
            score = [sum(weights[:, q, j].mean().item() for q in judges) for j in range(S)]
            images = sorted((j for j in alive if image[j]), key=lambda j: -score[j])
            alive = [j for j in alive if j not in images[keep:]]
            if renumber:
                positions = torch.zeros(1, S, dtype=torch.long)
                positions[0, alive] = torch.arange(len(alive))
        weights, given_mask = attend(layer)
        hidden = layer(hidden, position_ids=positions, **given_mask)
    return alive, model.norm(hidden)[0]


@pytest.mark.parametrize("judges", [None, [15, 18]])
@pytest.mark.parametrize(
    ("method", "plan"),
    [
        (FastV(2, 0.5), {2: (1, 6)}),
        (FastV(1, 0.75), {1: (0, 3)}),
        (PyramidDrop((2, 4), (0.5, 0.25)), {2: (2, 6), 4: (4, 3)}),
        (PyramidDrop((1, 2, 5), (0.8, 0.3, 0.0)), {1: (1, 9), 2: (2, 3), 5: (5, 0)}),
    ],
    ids=str,
)
def test_dropping_is_hiding(method, plan, judges) -> None:
    model, (embeds, image) = tiny_llama("eager", key_heads=2), samples()[0]
    given_judges = None
    if judges is not None:
        given_judges = torch.zeros(1, 20, dtype=torch.bool)
        given_judges[0, judges] = True
    with torch.no_grad():
        rows = Rows.build(image[None], judges=given_judges)
        ours, left = run_reduced(model, method, embeds[None], rows=rows)
        alive, expected = slow_run(model, embeds, image, plan, method.renumber, judges or [19])
    assert left is not None and left.origin[0].tolist() == alive
    torch.testing.assert_close(ours[0], expected[alive], atol=1e-4, rtol=0)


# --- batches


def samples() -> list[tuple[Tensor, Tensor]]:
    """Embeddings and image masks: one image, two images, text only, a short one."""
    generator = torch.Generator().manual_seed(5)
    masks = [
        one_image(20, 3, 12)[0],
        (one_image(24, 2, 8) | one_image(24, 12, 8))[0],
        torch.zeros(9, dtype=torch.bool),
        one_image(14, 1, 11)[0],
    ]
    return [(torch.randn(len(mask), 32, generator=generator), mask) for mask in masks]


def batch(padding: str) -> tuple[Tensor, Tensor, Tensor]:
    parts = samples()
    most = max(len(mask) for _, mask in parts)
    embeds = torch.zeros(len(parts), most, 32)
    image, valid = (torch.zeros(len(parts), most, dtype=torch.bool) for _ in range(2))
    for row, (rows, mask) in enumerate(parts):
        cut = slice(0, len(mask)) if padding == "right" else slice(most - len(mask), most)
        embeds[row, cut], image[row, cut], valid[row, cut] = rows, mask, True
    return embeds, image, valid


PYRAMID = PyramidDrop(layers=(2, 4), ratios=(0.5, 0.25))
METHODS = [FastV(2, 0.5), FastV(1, 0.8), PYRAMID]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_batch_equals_single_and_cached_equals_uncached(
    method, attention, key_heads, padding
) -> None:
    # Eager attention hides keys by the lowest float64, which is -inf in its float32 softmax.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model = tiny_llama(attention, key_heads).to(dtype)
    embeds, image, valid = batch(padding)
    embeds = embeds.to(dtype)
    more = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(9)).to(dtype)
    limit = {"atol": 1e-8 if dtype == torch.float64 else 1e-4, "rtol": 0}
    cache = DynamicCache(config=model.config)
    mask = valid
    with torch.no_grad():
        rows = Rows.build(image, valid=valid)
        hidden, left = run_reduced(model, method, embeds, rows=rows, past_key_values=cache)
        assert left is not None
        restored = left.restore(hidden, embeds.shape[1])
        decoded = []
        for step in more.split(1, dim=1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
            out, _ = run_reduced(model, method, step, attention_mask=mask, past_key_values=cache)
            decoded.append(out)
        for row, (own, own_mask) in enumerate(samples()):
            n = len(own_mask)
            whole = torch.cat([own.to(dtype), more[row]])[None]
            judges = torch.arange(n + 3)[None] == n - 1
            whole_mask = torch.nn.functional.pad(own_mask, (0, 3))[None]
            rows = Rows.build(whole_mask, judges=judges)
            single, single_left = run_reduced(model, method, whole, rows=rows)
            assert single_left is not None
            expected = single_left.restore(single, n + 3)[0]
            torch.testing.assert_close(restored[row][valid[row]], expected[:n], **limit)
            torch.testing.assert_close(torch.cat(decoded, dim=1)[row], expected[n:], **limit)


@pytest.mark.parametrize("method", [FastV(2, 0.0), PyramidDrop((2, 4), (1.0, 1.0))], ids=str)
def test_dropping_nothing_is_the_stock_model(method) -> None:
    model = tiny_llama()
    embeds, image, valid = batch("left")
    rows = Rows.build(image, valid=valid)
    with torch.no_grad():
        hidden, left = run_reduced(model, method, embeds, rows=rows)
        stock = model(
            inputs_embeds=embeds, attention_mask=valid.long(), position_ids=rows.positions
        ).last_hidden_state
    assert left is not None
    assert torch.equal(left.valid, valid)
    torch.testing.assert_close(hidden[valid], stock[valid], atol=1e-5, rtol=0)


def test_rows_that_stay_get_gradients_and_dropped_ones_only_from_earlier_layers() -> None:
    model = tiny_llama().train()
    embeds, image, valid = batch("right")
    embeds.requires_grad_()
    hidden, left = run_reduced(model, PYRAMID, embeds, rows=Rows.build(image, valid=valid))
    assert left is not None
    hidden[left.valid].square().sum().backward()
    assert embeds.grad is not None
    assert (embeds.grad[valid].abs().sum(dim=-1) > 0).all(), "dropped rows still acted as keys"
    assert not embeds.grad[~valid].any()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_second_turn_at_once_equals_row_by_row(method) -> None:
    model = tiny_llama(key_heads=2).double()
    embeds, image, valid = batch("left")
    more = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(2)).double()
    outs = []
    with torch.no_grad():
        for steps in ([more], more.split(1, dim=1)):
            cache, mask, decoded = DynamicCache(config=model.config), valid, []
            rows = Rows.build(image, valid=valid)
            run_reduced(model, method, embeds.double(), rows=rows, past_key_values=cache)
            for step in steps:
                mask = torch.nn.functional.pad(mask, (0, step.shape[1]), value=True)
                out, _ = run_reduced(
                    model, method, step, attention_mask=mask, past_key_values=cache
                )
                decoded.append(out)
            outs.append(torch.cat(decoded, dim=1))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-8, rtol=0)


def test_a_cut_cache_decodes_again_alike() -> None:
    model = tiny_llama()
    embeds, image, _ = batch("left")
    embeds, image = embeds[1:2], image[1:2]
    step = torch.randn(1, 1, 32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        run_reduced(model, PYRAMID, embeds, rows=Rows.build(image), past_key_values=cache)
        first, _ = run_reduced(model, PYRAMID, step, past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-1)
        again, _ = run_reduced(model, PYRAMID, step, past_key_values=cache)
    torch.testing.assert_close(first, again)


def test_refusals() -> None:
    model = tiny_llama()
    embeds, image, valid = batch("left")
    rows, cache = Rows.build(image, valid=valid), DynamicCache(config=model.config)
    run_reduced(model, PYRAMID, embeds, rows=rows, past_key_values=cache)
    with pytest.raises(ValueError, match=r"pyramiddrop.*24 rows are cached"):
        run_reduced(model, PYRAMID, embeds, rows=rows, past_key_values=cache)
    with pytest.raises(ValueError, match="batch of 4, now the batch is 1"):
        run_reduced(model, PYRAMID, embeds[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"fastv.layer.*1 to 5.*6"):
        layer_stages(FastV(6), 6)
    with pytest.raises(ValueError, match=r"fastv.layer.*at least 1.*0"):
        FastV(0)
    with pytest.raises(ValueError, match=r"pyramiddrop.layers.*ascend.*\[4, 2\]"):
        PyramidDrop((4, 2), (0.5, 0.25))
    with pytest.raises(ValueError, match=r"pyramiddrop.ratios.*\[0.25, 0.5\]"):
        PyramidDrop((2, 4), (0.25, 0.5))
    with pytest.raises(ValueError, match=r"length"):
        PyramidDrop((2, 4), (0.25,))


# --- selection


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_selection_and_packing(data) -> None:
    """Against a list per sample: what stays, in order, and where it goes."""
    B, S = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    right = data.draw(st.booleans())
    image, valid = torch.zeros(B, S, dtype=torch.bool), torch.zeros(B, S, dtype=torch.bool)
    for row in range(B):
        n = data.draw(st.integers(2, S))
        valid[row, :n] = True
        kinds = data.draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))
        image[row, : n - 1] = torch.tensor(kinds, dtype=torch.bool)
        if not right:
            valid[row], image[row] = valid[row].roll(S - n), image[row].roll(S - n)
    values = data.draw(st.lists(st.integers(0, 3), min_size=B * S, max_size=B * S))
    scores = torch.tensor(values).float().view(B, S)
    keep = torch.tensor([data.draw(st.integers(0, S)) for _ in range(B)])
    rows = Rows.build(image, valid=valid)
    kept = select(scores, rows, keep)
    left, index = rows.keep(kept, renumber=False)
    for row in range(B):
        candidates = [j for j in range(S) if image[row, j]]
        best = sorted(candidates, key=lambda j: (-scores[row, j].item(), j))[: int(keep[row])]
        expected = [j for j in range(S) if valid[row, j] and (not image[row, j] or j in best)]
        real = left.valid[row]
        assert left.origin[row][real].tolist() == expected == index[row][real].tolist()
        assert left.positions[row][real].tolist() == rows.positions[row][expected].tolist()
        assert left.image[row].sum() == len(best)
        judged = left.origin[row, left.queries[row, 0]].item()
        assert judged == max(j for j in range(S) if valid[row, j])
        # Padding stays on its side.
        assert real.tolist() == sorted(real.tolist(), reverse=rows.padded_right)
    hidden = torch.arange(1.0, B * S + 1).view(B, S, 1)
    packed = hidden.gather(1, index[..., None])
    assert torch.equal(left.restore(packed, S), hidden * kept[..., None])
