"""Making proxies, and adding what they know to the tokens they cover."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from proxyv.model.guided_update import FreshLinear, GuidedUpdate
from proxyv.model.proxies import add_to_blocks, make_spatial_proxies


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
    torch.testing.assert_close(update(full, proxies, 4, 2), expected)


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
