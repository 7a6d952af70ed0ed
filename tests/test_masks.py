"""The fast masks equal the rule applied pair by pair."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Token, sees
from test_layout import PER_CROP, REDUCE, SIDE, batches, lay_out

from proxyv.model.masks import light_mask, ordinary_mask, proxy_mask, to_backend, visible


def kinds(parts: list[int | str], released: bool) -> list[Token]:
    """The tokens of one unpadded row, as the oracle sees them."""
    tokens: list[Token] = []
    for part in parts:
        if not isinstance(part, str):
            tokens += [Token("text", len(tokens) + i) for i in range(part)]
            continue
        for crop in range(int(part)):
            tokens += [Token("full", len(tokens) + i) for i in range(SIDE * SIDE)]
            early = PER_CROP if released and crop else 0
            tokens.append(Token("newline", len(tokens) - early))
    return tokens


def proxies(parts: list[int | str]) -> list[Token]:
    out, column = [], 0
    for part in parts:
        if isinstance(part, str):
            count = int(part) * (SIDE // REDUCE) ** 2
            out += [Token("proxy", column + i) for i in range(count)]
            column += int(part) * PER_CROP
        else:
            column += part
    return out


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batches, st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 3))
def test_masks_equal_brute_force(batch, side, released, past) -> None:
    layout, real = lay_out(batch, side, released)
    B, S = real.shape
    past_valid = torch.ones(B, past, dtype=torch.bool)
    natural = light_mask(layout, real, past_valid, past + S + 2, True)
    stream = light_mask(layout, real, past_valid[:, :0], S, False)
    between = proxy_mask(layout)
    everything = ordinary_mask(layout, real, past_valid, past + S)
    num_light = layout.light_index.shape[1]
    assert natural.shape == (B, num_light, past + S + 2)
    assert not natural[..., past + S :].any()
    for row, parts in enumerate(batch):
        tokens, proxy_tokens = kinds(parts, released), proxies(parts)
        start = S - len(tokens) if side == "left" else 0
        light = [t for t in tokens if t.kind != "full"]
        full = [t for t in tokens if t.kind == "full"]
        for i, query in enumerate(light):
            expected = [sees(query, key) for key in tokens]
            window = slice(past + start, past + start + len(tokens))
            assert natural[row, i, window].tolist() == expected
            assert natural[row, i, :past].all()
            assert int(natural[row, i].sum()) == sum(expected) + past
            assert stream[row, i, : len(light)].tolist() == [sees(query, key) for key in light]
            found = stream[row, i, num_light : num_light + len(full)].tolist()
            assert found == [sees(query, key) for key in full]
            assert not stream[row, i, len(light) : num_light].any()
        num_proxies = layout.proxy_valid.shape[1]
        for i, query in enumerate(proxy_tokens):
            keys = between[row, i]
            assert keys[: len(proxy_tokens)].tolist() == [sees(query, k) for k in proxy_tokens]
            found = keys[num_proxies : num_proxies + len(light)].tolist()
            assert found == [sees(query, key) for key in light]
            assert int(keys.sum()) == sum(sees(query, k) for k in proxy_tokens + light)
        for i, query in enumerate(tokens):
            expected = [key.position <= query.position for key in tokens]
            window = slice(past + start, past + start + len(tokens))
            assert everything[row, start + i, window].tolist() == expected
    assert all(mask.any(-1).all() for mask in (natural, stream, between, everything))


def test_every_query_sees_something() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    mask = visible(torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2]]), nothing)
    assert mask.tolist() == [[[True, False, False]] * 2]


def test_proxies_see_cached_newlines_and_text_only() -> None:
    layout, _ = lay_out([["1", 2]])
    past = torch.tensor([[True, False]])
    mask = proxy_mask(layout, past)
    assert mask.shape == (1, 4, 4 + 3 + 2)
    assert mask[0, :, -2:].tolist() == [[True, False]] * 4


def test_eager_takes_floats_and_others_booleans() -> None:
    mask = torch.tensor([[[True, False]]])
    assert to_backend(mask, "sdpa", torch.float32).dtype == torch.bool
    added = to_backend(mask, "eager", torch.bfloat16)
    assert added.shape == (1, 1, 1, 2)
    assert added.dtype == torch.bfloat16
    assert added[0, 0, 0].tolist() == [0.0, torch.finfo(torch.bfloat16).min]
