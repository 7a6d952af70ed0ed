"""Gradient norms by parameter group, read where every backend shows them: at the optimiser's step.

DeepSpeed hands the optimiser its own flat shards in place of parameters, clipped, group by group;
a hook on the step sees them as it sees ordinary gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["GroupNorms"]


class GroupNorms:
    """Sums squared gradients by the ``name`` of their group.

    Args:
        optimizer: its groups have names.
        wanted: whether the step that is being made is one to measure.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, wanted: Callable[[], bool]) -> None:
        self._wanted = wanted
        self._names = list(dict.fromkeys(group["name"] for group in optimizer.param_groups))
        self._squares: dict[str, Any] = {}
        optimizer.register_step_pre_hook(self._see)

    def _see(self, optimizer: Any, *args: Any) -> None:
        if not self._wanted():
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
                    name = group["name"]
                    self._squares[name] = self._squares.get(name, 0.0) + norm.double() ** 2

    def before_clipping(
        self,
        total: float,
        limit: float,
        sum_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, float]:
        """Norm of each group since the last call, before clipping.

        Args:
            total: norm of all gradients before clipping.
            limit: what they were clipped to; 0 for no clipping.
            sum_over_ranks: for shards; None where every rank has all gradients.
        """
        found = [float(self._squares.get(name, 0.0)) for name in self._names]
        squares, self._squares = torch.tensor(found, dtype=torch.float64), {}
        if sum_over_ranks is not None:
            squares = sum_over_ranks(squares)
        scale = max(1.0, (total + 1e-6) / limit) if limit > 0 else 1.0
        return {n: s**0.5 * scale for n, s in zip(self._names, squares.tolist(), strict=True)}
