"""The light MLP that refreshes every full token with the help of its proxy.

``u = W2 SiLU(W1 [W_in x ; W_ctx p])`` and ``x <- RMSNorm(x + u)``, no biases. W1 acts on a
concatenation and nothing nonlinear stands between, so it is kept here as its two halves:
``W1 [a ; b] = W1a a + W1b b``. The half that acts on the proxies is computed once per proxy and
broadcast over the block of full tokens that the proxy covers, or, for learned proxies, mixed by
their splat matrix, which commutes with it; no concatenation is ever built. For inference each half
can be folded with the projection before it, ``(W1a W_in) x``, see ``GuidedUpdate.fuse``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from proxyv.model.layout import CropGroup
from proxyv.model.linear import FreshLinear
from proxyv.model.passes import add_to, normalise
from proxyv.model.proxies import add_by_splat, add_to_blocks, join_groups, split_groups

__all__ = ["GuidedUpdate"]


class GuidedUpdate(nn.Module):
    """Guided update of the full tokens of one decoder layer.

    Args:
        hidden_size: model width D.
        width: hidden width h.
        norm: normalisation of the result, of the language model's family, over D.

    Source: paper section 3.2; authors' VisionMLP. Differs: the two halves of ``proj.0`` are two
        layers (``merge_input``, ``merge_context``), so nothing is concatenated.
    """

    def __init__(self, hidden_size: int, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.input_proj = FreshLinear(hidden_size, width)
        self.context_proj = FreshLinear(hidden_size, width)
        self.merge_input = FreshLinear(width, width, fan_in=2 * width)
        self.merge_context = FreshLinear(width, width, fan_in=2 * width)
        self.output_proj = FreshLinear(width, hidden_size)
        self.norm = norm
        self.fused_input: Tensor | None
        self.fused_context: Tensor | None
        self.register_buffer("fused_input", None, persistent=False)
        self.register_buffer("fused_context", None, persistent=False)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold each half of W1 with the projection before it, until ``train()`` or ``unfuse()``.

        The weights stay as they are, and so do checkpoints: what is folded, (h, D) twice, comes
        on top. Loading other weights unfolds; writing into the weights by hand does not.

        Raises:
            ValueError: in training, or where a weight cannot be read as it is (an adapter,
                quantised or sharded weights).
        """
        if self.training:
            raise ValueError("fuse() is for inference: call eval() first")
        self.fused_input = _folded(self.merge_input, self.input_proj)
        self.fused_context = _folded(self.merge_context, self.context_proj)

    def unfuse(self) -> None:
        """Forget what was folded."""
        self.fused_input = self.fused_context = None

    def train(self, mode: bool = True) -> GuidedUpdate:
        """Set the mode; training unfolds."""
        if mode:
            self.unfuse()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfuse()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(
        self,
        full: Tensor,
        proxies: Tensor,
        groups: Sequence[CropGroup],
        reduce: int,
        splats: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Refresh the full tokens.

        Args:
            full: (B, F, D) as they entered the layer, group after group.
            proxies: (B, P, D) as they leave it, likewise.
            groups: the crops of each side; only spatial proxies need them.
            reduce: side reduction r of spatial proxies.
            splats: for each group (B, C, n, m), the shares that the n tokens of a crop have in
                its m learned proxies; None for spatial ones.

        Returns:
            (B, F, D).
        """
        if self.fused_input is None or self.fused_context is None:
            hidden = self.merge_input(self.input_proj(full))  # (B, F, h)
            context = self.merge_context(self.context_proj(proxies))  # (B, P, h)
        else:
            hidden = torch.nn.functional.linear(full, self.fused_input)
            context = torch.nn.functional.linear(proxies, self.fused_context)
        if splats is None:
            hidden = join_groups(
                [
                    add_to_blocks(part, told, group.side, reduce)
                    for part, told, group in zip(
                        split_groups(hidden, [g.num_full for g in groups]),
                        split_groups(context, [g.num_crops * g.num_proxies for g in groups]),
                        groups,
                        strict=True,
                    )
                ]
            )
        else:
            sizes = [splat.shape[1:] for splat in splats]  # crops, tokens and proxies of each
            hidden = join_groups(
                [
                    add_by_splat(part, told, splat)
                    for part, told, splat in zip(
                        split_groups(hidden, [C * n for C, n, _ in sizes]),
                        split_groups(context, [C * m for C, _, m in sizes]),
                        splats,
                        strict=True,
                    )
                ]
            )
        hidden = torch.nn.functional.silu(hidden, inplace=not torch.is_grad_enabled())
        return normalise(self.norm, add_to(self.output_proj(hidden), full))


def _folded(outer: nn.Module, inner: nn.Module) -> Tensor:
    """The weight (h, D) of ``outer(inner(x))``, multiplied in float32 at least."""
    for layer in (outer, inner):
        weight: Any = getattr(layer, "weight", None)
        plain = type(layer) is FreshLinear and weight is not None and weight.dim() == 2
        if not plain or weight.is_meta or not weight.is_floating_point() or not weight.numel():
            raise ValueError(
                f"fuse() cannot read the weight of a {type(layer).__name__}: merge adapters, and "
                "gather sharded or load unquantised weights first"
            )
    left: Any = outer.weight
    right: Any = inner.weight
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)
