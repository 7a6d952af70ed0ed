"""Making proxies, and adding what they know to the tokens they cover."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reduction_cases import golden_cases
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from proxyv.model.guided_update import GuidedUpdate
from proxyv.model.layout import CropGroup
from proxyv.model.linear import FreshLinear
from proxyv.model.proxies import (
    ProxyInitializer,
    add_by_splat,
    add_to_blocks,
    make_spatial_proxies,
)


@pytest.mark.parametrize(("side", "reduce"), [(24, 4), (12, 4), (12, 3), (4, 1), (6, 6), (10, 5)])
@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_equals_torch_resampling(side: int, reduce: int, mode: str) -> None:
    full = torch.randn(2, 3 * side * side, 5)
    grid = full.view(6, side, side, 5).permute(0, 3, 1, 2)
    if mode == "bilinear":
        expected = F.interpolate(grid, scale_factor=1 / reduce, mode="bilinear")
    else:
        expected = F.avg_pool2d(grid, reduce)
    expected = expected.permute(0, 2, 3, 1).reshape(2, -1, 5)
    proxies = make_spatial_proxies(full, side, reduce, mode)
    assert proxies.shape == (2, 3 * (side // reduce) ** 2, 5)
    torch.testing.assert_close(proxies, expected, atol=1e-6, rtol=0)


def test_the_block_of_each_proxy() -> None:
    context = torch.arange(4.0).view(1, 4, 1)
    added = add_to_blocks(torch.zeros(1, 16, 1), context, 4, 2).view(4, 4)
    assert added.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"side_reduction=3 .* 4 patches"):
        make_spatial_proxies(torch.zeros(1, 16, 2), 4, 3, "bilinear")
    with pytest.raises(ValueError, match=r"17 full tokens .* 4 x 4"):
        make_spatial_proxies(torch.zeros(1, 17, 2), 4, 2, "bilinear")


def test_guided_update_equals_the_concatenated_form() -> None:
    torch.manual_seed(0)
    update = GuidedUpdate(8, 6, torch.nn.RMSNorm(8, eps=1e-6)).double()
    full, proxies = torch.randn(2, 32, 8).double(), torch.randn(2, 8, 8).double()
    covering = proxies.view(2, 2, 2, 1, 2, 1, 8).expand(2, 2, 2, 2, 2, 2, 8).reshape(2, 32, 8)
    joined = torch.cat([update.input_proj(full), update.context_proj(covering)], dim=-1)
    merge = torch.cat([update.merge_input.weight, update.merge_context.weight], dim=1)
    expected = update.norm(full + update.output_proj(F.silu(joined @ merge.T)))
    torch.testing.assert_close(
        update(full, proxies, [CropGroup(4, full.shape[1] // 16, 4)], 2), expected
    )


class ShapesMade(TorchDispatchMode):
    """Notes the operation and shape of every tensor that owns new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.made.append((str(func), tuple(tensor.shape)))
        return out


@pytest.mark.parametrize("kind", ["spatial", "learned"])
@pytest.mark.parametrize("crops", [1, 3])
def test_the_concatenation_is_never_made_in_training_either(crops: int, kind: str) -> None:
    h, rows = 10, crops * 64
    update = GuidedUpdate(32, h, torch.nn.RMSNorm(32)).train()
    full = torch.randn(2, rows, 32, requires_grad=True)
    proxies = torch.randn(2, crops * 4, 32, requires_grad=True)
    splats = None
    if kind == "learned":
        splats = [torch.rand(2, crops, 64, 4, requires_grad=True)]
    with ShapesMade() as watched:
        update(full, proxies, [CropGroup(8, crops, 4)], 4, splats).square().sum().backward()
    assert all(p.grad is not None for p in [full, proxies, *update.parameters()])
    per_token = [shape for _, shape in watched.made if math.prod(shape) >= 2 * rows * h]
    assert per_token and {math.prod(shape) // (2 * rows) for shape in per_token} <= {h, 32}
    assert not any("cat" in name for name, _ in watched.made)


def test_guided_update_has_the_papers_size() -> None:
    with torch.device("meta"):
        update = GuidedUpdate(4096, 1024, torch.nn.RMSNorm(4096))
    assert sum(p.numel() for p in update.parameters()) == 14_684_160


def test_fresh_weights_are_uniform_within_the_bound() -> None:
    torch.manual_seed(0)
    layer = FreshLinear(100, 200, fan_in=400)
    layer.init_weights()
    bound = 1 / 400**0.5
    assert layer.bias is None
    assert 0.98 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert abs(float(layer.weight.detach().std()) - bound / 3**0.5) < 0.02 * bound


@pytest.mark.parametrize("num_proxies", [1, 5, 16])
def test_learned_proxies_crop_by_crop(num_proxies: int) -> None:
    torch.manual_seed(0)
    make = ProxyInitializer(8, 6, num_proxies).double()
    full = torch.randn(2, 3 * 10, 8).double()
    proxies, splat = make(full, 10)
    assert proxies.shape == (2, 3 * num_proxies, 8)
    assert splat.shape == (2, 3, 10, num_proxies)
    crop = full[1, 10:20]
    scores = make.queries @ make.key_proj(crop).T / 6**0.5
    rows = slice(num_proxies, 2 * num_proxies)
    torch.testing.assert_close(proxies[1, rows], scores.softmax(-1) @ crop, atol=1e-6, rtol=0)
    torch.testing.assert_close(splat[1, 1], scores.T.softmax(-1), atol=1e-6, rtol=0)
    added = add_by_splat(full, proxies, splat)[1, 10:20]
    torch.testing.assert_close(added, crop + splat[1, 1] @ proxies[1, rows])
    with pytest.raises(ValueError, match=r"30 full tokens .* crops of 7"):
        make(full, 7)


def test_masked_tokens_leave_no_trace_in_learned_proxies() -> None:
    torch.manual_seed(0)
    make = ProxyInitializer(8, 6, 3)
    full = torch.randn(1, 12, 8)
    valid = torch.tensor([[True] * 4 + [False] * 2 + [True] * 6])
    proxies, splat = make(full, 6, valid)
    alone, shares = make(full[:, :4], 4)
    torch.testing.assert_close(proxies[:, :3], alone)
    torch.testing.assert_close(splat[:, :1, :4], shares)
    assert splat[0, 0, 4:].abs().max() == 0
    torch.testing.assert_close(proxies[:, 3:], make(full[:, 6:], 6)[0])
    empty, nothing = make(full, 6, torch.zeros(1, 12, dtype=torch.bool))
    assert torch.isfinite(empty).all() and nothing.abs().max() == 0


def test_the_splat_commutes_with_the_projections_of_the_context() -> None:
    torch.manual_seed(0)
    update = GuidedUpdate(8, 6, torch.nn.RMSNorm(8, eps=1e-6)).double()
    full, proxies = torch.randn(2, 20, 8).double(), torch.randn(2, 6, 8).double()
    splat = torch.randn(2, 2, 10, 3).double().softmax(-1)
    context = (splat @ proxies.view(2, 2, 3, 8)).flatten(1, 2)
    joined = torch.cat([update.input_proj(full), update.context_proj(context)], dim=-1)
    merge = torch.cat([update.merge_input.weight, update.merge_context.weight], dim=1)
    expected = update.norm(full + update.output_proj(F.silu(joined @ merge.T)))
    torch.testing.assert_close(update(full, proxies, (), 0, [splat]), expected)


@pytest.mark.parametrize("path", golden_cases("proxyv_learned"))
def test_learned_proxies_are_the_authors(path: Path) -> None:
    tensors = load_file(path)
    full, splat = tensors["full_tokens"], tensors["splat_attn"]
    B, D = full.shape[0], full.shape[-1]
    crop_tokens, m = splat.shape[1:]
    make = ProxyInitializer(D, tensors["init.Wk.weight"].shape[0], m)
    make.load_state_dict(
        {"queries": tensors["init.proxyv_tokens"], "key_proj.weight": tensors["init.Wk.weight"]}
    )
    width = tensors["mlp.input_proj.weight"].shape[0]
    update = GuidedUpdate(D, width, torch.nn.RMSNorm(D, eps=1e-5))
    merge_input, merge_context = tensors["mlp.proj.0.weight"].chunk(2, dim=1)
    update.load_state_dict(
        {
            "input_proj.weight": tensors["mlp.input_proj.weight"],
            "context_proj.weight": tensors["mlp.context_proj.weight"],
            "merge_input.weight": merge_input,
            "merge_context.weight": merge_context,
            "output_proj.weight": tensors["mlp.proj.2.weight"],
            "norm.weight": tensors["mlp.layernorm_post.weight"],
        }
    )
    with torch.no_grad():
        proxies, ours = make(full, crop_tokens)
        out = update(full, tensors["updated_proxy"], (), 0, [ours])
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(proxies, tensors["proxy_tokens"], **close)
    torch.testing.assert_close(ours, splat.view(B, -1, crop_tokens, m), **close)
    torch.testing.assert_close(out, tensors["out_full_tokens"], **close)
