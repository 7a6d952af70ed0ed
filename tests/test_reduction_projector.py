"""TokenPacker against reference outputs and against a restatement block by block."""

from __future__ import annotations

import math

import pytest
import torch
from reduction_cases import golden_cases, read, settings_of

from proxyv.reduction.tokenpacker import TokenPacker

NAMES = {
    "q_proj_1": "query_proj", "ln_q_1": "query_norm", "k_proj_1": "key_mlp", "ln_k_1": "key_norm",
    "v_proj_1": "value_mlp", "ln_v_1": "value_norm", "clip_attn": "attention", "mlp": "out_mlp",
}  # fmt: skip


@pytest.mark.parametrize("path", golden_cases("tokenpacker"))
def test_tokenpacker_golden(path) -> None:
    case = read(path)
    side, width = math.isqrt(case["x"].shape[1]), case["x"].shape[-1]
    levels = case["x_multi"].shape[-1] // width
    state = {}
    for name, tensor in read(path, "w.").items():
        head, _, rest = name.partition(".")
        state[f"{NAMES[head]}.{rest}"] = tensor
    for (scale,) in settings_of(path, r"s(\d+)\.out"):
        expected = case[f"s{scale}.out"]
        projector = TokenPacker(scale, heads=2).build(width, expected.shape[-1], side, levels)
        projector.load_state_dict(state)
        with torch.no_grad():
            out = projector.pack(case["x"], case["x_multi"])
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_each_token_knows_its_own_block_only(generator) -> None:
    projector = TokenPacker(scale=3, heads=2).build(8, 10, 6, 2).double()
    features = torch.randn(2, 36, 16, generator=generator).double()
    out = projector(features)
    assert out.shape == (2, 4, 10) and TokenPacker(3, 2).tokens_per_crop(36) == 4
    for cell in range(4):
        row, column = divmod(cell, 2)
        inside = [
            (3 * row + y) * 6 + 3 * column + x for y in range(3) for x in range(3)
        ]  # fmt: skip
        query = projector.query_norm(projector.query_proj(features[:, inside[4], -8:]))
        key = projector.key_norm(projector.key_mlp(features[:, inside]))
        value = projector.value_norm(projector.value_mlp(features[:, inside]))
        packed, _ = projector.attention(query[:, None], key, value)
        torch.testing.assert_close(out[:, cell], projector.out_mlp(packed)[:, 0])


def test_everything_gets_a_gradient_and_starts_as_described(generator) -> None:
    projector = TokenPacker(scale=2, heads=4).build(64, 64, 4, 1)
    projector(torch.randn(3, 16, 64, generator=generator)).square().sum().backward()
    for name, parameter in projector.named_parameters():
        # A key bias shifts all scores of a query alike, so nothing depends on it.
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert not projector.out_mlp[0].bias.any()
    assert 0.017 < projector.query_proj.weight.std() < 0.023


def test_tokenpacker_refusals(generator) -> None:
    with pytest.raises(ValueError, match=r"tokenpacker.scale=5.*side of 12.*1, 2, 3, 4, 6, 12"):
        TokenPacker(5).build(16, 8, 12, 1)
    with pytest.raises(ValueError, match=r"tokenpacker.heads=8.*width of 12"):
        TokenPacker(2).build(12, 8, 12, 1)
    with pytest.raises(ValueError, match=r"16 patches with 12 features.*16 with 2 x 12.*feature_l"):
        TokenPacker(2, heads=2).build(12, 8, 4, 2)(torch.randn(1, 16, 12))
