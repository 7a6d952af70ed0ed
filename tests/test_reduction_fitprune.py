"""FitPrune against reference outputs, and its calibration against a slow restatement."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reduction_cases import golden_cases, read
from test_reduction_decoder import one_image, samples, tiny_llama
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from proxyv.reduction.attention import attention_rows, decoder_heads
from proxyv.reduction.decoding import run_reduced
from proxyv.reduction.fitprune import FitPrune, head_max_sums
from proxyv.reduction.fitprune_calibration import (
    AttentionSums,
    calibrate,
    counts_for,
    read_sums,
    saved_share,
)
from proxyv.reduction.rows import Rows, select


@pytest.mark.parametrize("path", golden_cases("fitprune"))
def test_fitprune_golden(path) -> None:
    case = read(path)
    S = case["hidden_states"].shape[1]
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
        num_hidden_layers=6, rope_theta=1e4,
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 3)
    layer.input_layernorm = torch.nn.Identity()  # the reference starts behind the norm
    layer.self_attn.load_state_dict(
        {name.removeprefix("w."): tensor for name, tensor in case.items() if name[:2] == "w."}
    )
    image = one_image(S, int(case["n_system"]), int(case["n_visual"]))
    rows = Rows.build(image)
    scheme = [0] * 6
    scheme[3] = int(case["n_removed"])
    method = FitPrune(tuple(scheme), int(case["n_visual"]))
    with torch.no_grad():
        rope = LlamaRotaryEmbedding(config)(case["hidden_states"], rows.positions)
        query, key = decoder_heads(layer, case["hidden_states"], rope, None)
        scaling = layer.self_attn.scaling
        scores = method.scores(query, key, rows, scaling)
        kept = select(scores, rows, method.keep_counts(0, rows))
        visible = torch.ones(S, S, dtype=torch.bool).tril()[None]
        value = layer.self_attn.v_proj(case["hidden_states"]).unflatten(-1, (2, 8)).transpose(1, 2)
        out = attention_rows(query, key, scaling, visible) @ value
        out = layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
    assert torch.equal(kept[0], case["keep_mask"])
    torch.testing.assert_close(out[kept][None], case["attn_output"], atol=1e-5, rtol=0)


def slow_sums(query: Tensor, key: Tensor, rows: Rows, scaling: float) -> tuple[Tensor, Tensor]:
    """One sample, row by row."""
    S = rows.valid.shape[1]
    text, image = torch.zeros(S), torch.zeros(S)
    last_image = max(j for j in range(S) if rows.image[0, j])
    for i in range(S):
        seen = [j for j in range(i + 1) if rows.valid[0, j]]
        if not rows.valid[0, i]:
            continue
        best = torch.zeros(S)
        for head in range(query.shape[1]):
            weights = (key[0, head][seen] @ query[0, head, i] * scaling).softmax(0)
            best[seen] = torch.maximum(best[seen], weights)
        if rows.image[0, i]:
            image += best
        elif i > last_image and rows.text[0, i]:
            text += best
    return text, image


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 7))
def test_head_max_sums_equal_slow_oracle(seed: int, padding: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 2, 14, 4, generator=generator) for _ in range(2))
    valid = torch.arange(14)[None] >= padding
    image = one_image(14, 4, 5)
    newline = torch.arange(14)[None] == 9
    rows = Rows.build(image, valid=valid, newline=newline)
    for ours, slow in zip(
        head_max_sums(query, key, rows, 0.5, block), slow_sums(query, key, rows, 0.5), strict=True
    ):
        torch.testing.assert_close(ours[0], slow)


@pytest.mark.parametrize("calibrated", [None, 12])
def test_cache_lengths_follow_the_scheme_and_a_batch_equals_its_samples(calibrated) -> None:
    model = tiny_llama(key_heads=2).double()
    method = FitPrune((0, 3, 2, 0, 1, 4), calibrated)
    parts = samples()
    most = max(len(mask) for _, mask in parts)
    embeds = torch.zeros(4, most, 32).double()
    image, valid = (torch.zeros(4, most, dtype=torch.bool) for _ in range(2))
    for row, (rows, mask) in enumerate(parts):
        embeds[row, most - len(mask) :] = rows.double()
        image[row, most - len(mask) :], valid[row, most - len(mask) :] = mask, True
    with torch.no_grad():
        batch = Rows.build(image, valid=valid)
        hidden, left = run_reduced(model, method, embeds, rows=batch)
        assert left is not None
        for row, (own, mask) in enumerate(parts):
            cache = DynamicCache(config=model.config)
            single_rows = Rows.build(mask[None])
            single, _ = run_reduced(
                model, method, own[None].double(), rows=single_rows, past_key_values=cache
            )
            real = left.valid[row]
            torch.testing.assert_close(hidden[row][real], single[0], atol=1e-5, rtol=0)
            n, S = int(mask.sum()), len(mask)
            gone = [0, 0, 3, 5, 5, 6]
            if calibrated:
                gone = [g * n // calibrated for g in gone]
            expected = [S - min(g, n) for g in gone]
            assert [cache.get_seq_length(i) for i in range(6)] == expected


def test_fitprune_refusals() -> None:
    with pytest.raises(ValueError, match=r"fitprune.scheme has 3.*6 layers"):
        FitPrune((1, 2, 3)).drops(6)
    with pytest.raises(ValueError, match=r"removes 600.*calibrated_tokens=576"):
        FitPrune((600,))
    with pytest.raises(ValueError, match=r"fitprune.scheme.*at least 0.*-1"):
        FitPrune((3, -1))


# --- calibration


def prefill_flops(width: int, intermediate: int, rows) -> int:
    """Projections, attention, gated MLP."""
    return sum(8 * n * width**2 + 4 * n * n * width + 6 * n * width * intermediate for n in rows)


def slow_counts(sums: AttentionSums, alpha: float) -> list[int]:
    gone: list[int] = []
    counts = []
    for text, image in zip(sums.from_text.double(), sums.from_image.double(), strict=True):
        sets = []
        for values in (text, image):
            rest = sorted((j for j in range(len(values)) if j not in gone), key=lambda j: values[j])
            lost = sum((values[j] for j in gone), torch.zeros(()).double())
            chosen = set()
            for j in rest:
                lost = lost + values[j]
                if lost > alpha * values.sum():
                    break
                chosen.add(j)
            sets.append(chosen)
        both = sets[0] & sets[1]
        counts.append(len(both))
        gone += sorted(both)
    return counts


def random_sums(seed: int, layers: int = 4, n: int = 12) -> AttentionSums:
    generator = torch.Generator().manual_seed(seed)
    text, image = (torch.rand(layers, n, generator=generator) for _ in range(2))
    return AttentionSums(text, image, 5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.98))
def test_counts_equal_slow_oracle(seed: int, alpha: float) -> None:
    sums = random_sums(seed)
    assert counts_for(sums, alpha) == slow_counts(sums, alpha)
    assert sum(counts_for(sums, 1.0)) == 12 and sum(counts_for(sums, 0.0)) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.4))
def test_calibration_meets_its_budget_and_a_smaller_share_does_not(seed: int, ratio: float) -> None:
    sums = random_sums(seed)

    def cost(rows) -> float:
        return prefill_flops(8, 16, rows)

    method = calibrate([sums], ratio, cost)
    assert method.calibrated_tokens == 12

    def saved(counts) -> float:
        rows, length = [], 12
        for count in counts:
            rows.append(length + 5)
            length -= count
        return 1 - cost(rows) / cost([17] * 4)

    assert saved(method.scheme) >= ratio - 1e-9
    assert saved_share(method, sums, cost) == pytest.approx(saved(method.scheme))
    steps = [counts_for(sums, step / 128) for step in range(129)]
    assert any(
        list(method.scheme) == after and saved(before) < ratio
        for before, after in itertools.pairwise(steps)
    ), "a share of attention smaller by a step would not be enough"


def test_calibration_of_a_model_runs_in_it() -> None:
    model = tiny_llama()
    read_samples = []
    for embeds, mask in samples()[:2]:
        rows = Rows.build(mask[None])
        sums = read_sums(model, embeds[None], rows)
        assert sums.from_text.shape == (6, int(mask.sum()))
        read_samples.append(sums)
        with torch.no_grad():  # the first layer's input is the embeddings
            rope = model.rotary_emb(embeds[None], position_ids=rows.positions)
            query, key = decoder_heads(model.layers[0], embeds[None], rope, None)
            text, _ = slow_sums(query, key, rows, model.layers[0].self_attn.scaling)
        torch.testing.assert_close(sums.from_text[0], text[mask], atol=1e-5, rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in model.layers), "hooks are gone"
    method = calibrate(read_samples, 0.3, lambda rows: prefill_flops(32, 40, rows))
    assert method.calibrated_tokens == 16 and len(method.scheme) == 6 and sum(method.scheme) > 0
    embeds, mask = samples()[0]
    run_reduced(model, method, embeds[None], rows=Rows.build(mask[None]))


def test_calibration_refusals() -> None:
    with pytest.raises(ValueError, match=r"ratio=0.99 cannot be saved"):
        calibrate([random_sums(0)], 0.99, lambda rows: prefill_flops(8, 16, rows))
    with pytest.raises(ValueError, match="at least one sample"):
        calibrate([], 0.5, sum)
    with pytest.raises(ValueError, match="batch of 1 with 0 image tokens"):
        read_sums(tiny_llama(), torch.randn(1, 4, 32), Rows.build(one_image(4, 0, 0)))
