"""The light MLP that refreshes every full token with the help of its proxy.

``u = W2 SiLU(W1 [W_in x ; W_ctx p])`` and ``x <- RMSNorm(x + u)``, no biases. W1 acts on a
concatenation and nothing nonlinear stands between, so it is kept here as its two halves:
``W1 [a ; b] = W1a a + W1b b``. The half that acts on the proxies is computed once per proxy and
broadcast over the block of full tokens that the proxy covers; no concatenation is ever built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from proxyv.model.proxies import add_to_blocks

__all__ = ["FreshLinear", "GuidedUpdate"]


class FreshLinear(nn.Linear):
    """A bias-free linear layer that starts uniformly within 1 / sqrt(fan_in), as torch's does.

    It exists so that a model can tell these layers from a backbone's, whose initialisation is
    normal with a fixed width: weights that are missing from a checkpoint, or materialised after
    the module was built, get the right distribution too.

    Args:
        in_features: input width.
        out_features: output width.
        fan_in: width that the bound comes from, where this layer is one part of a wider one.
    """

    def __init__(self, in_features: int, out_features: int, fan_in: int | None = None) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.fan_in = fan_in or in_features

    def init_weights(self) -> None:
        """Draw the weights; one that was loaded from a checkpoint is left alone."""
        bound = 1 / math.sqrt(self.fan_in)
        init.uniform_(self.weight, -bound, bound)


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

    def forward(self, full: Tensor, proxies: Tensor, side: int, reduce: int) -> Tensor:
        """Refresh the full tokens.

        Args:
            full: (B, C*side*side, D) as they entered the layer.
            proxies: (B, C*(side//reduce)**2, D) as they leave it.
            side: crop side in patches.
            reduce: side reduction r.

        Returns:
            (B, C*side*side, D).
        """
        hidden = self.merge_input(self.input_proj(full))  # (B, F, h)
        context = self.merge_context(self.context_proj(proxies))  # (B, P, h)
        hidden = torch.nn.functional.silu(add_to_blocks(hidden, context, side, reduce))
        return self.norm(full + self.output_proj(hidden))
