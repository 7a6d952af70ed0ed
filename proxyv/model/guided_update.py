"""The light MLP that refreshes every full token with the help of its proxy.

``u = W2 SiLU(W1 [W_in x ; W_ctx p])`` and ``x <- RMSNorm(x + u)``, no biases. W1 acts on a
concatenation and nothing nonlinear stands between, so it is kept here as its two halves:
``W1 [a ; b] = W1a a + W1b b``. The half that acts on the proxies is computed once per proxy and
broadcast over the block of full tokens that the proxy covers, or, for learned proxies, mixed by
their splat matrix, which commutes with it; no concatenation is ever built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from proxyv.model.linear import FreshLinear
from proxyv.model.proxies import add_by_splat, add_to_blocks

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

    def forward(
        self,
        full: Tensor,
        proxies: Tensor,
        side: int,
        reduce: int,
        splat: Tensor | None = None,
    ) -> Tensor:
        """Refresh the full tokens.

        Args:
            full: (B, C*side*side, D) as they entered the layer.
            proxies: (B, P, D) as they leave it.
            side: crop side in patches.
            reduce: side reduction r of spatial proxies.
            splat: (B, C, side*side, P/C) shares of learned proxies; None for spatial ones.

        Returns:
            (B, C*side*side, D).
        """
        hidden = self.merge_input(self.input_proj(full))  # (B, F, h)
        context = self.merge_context(self.context_proj(proxies))  # (B, P, h)
        if splat is None:
            hidden = add_to_blocks(hidden, context, side, reduce)
        else:
            hidden = add_by_splat(hidden, context, splat)
        hidden = torch.nn.functional.silu(hidden)
        return self.norm(full + self.output_proj(hidden))
