"""The linear layer that ProxyV adds to a backbone."""

from __future__ import annotations

import math

from torch import nn
from transformers import initialization as init

__all__ = ["FreshLinear"]


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
