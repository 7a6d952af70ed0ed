"""The language-model head: logits, or the loss of given rows without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "IGNORE_INDEX",
    "LOGITS_AT_ONCE",
    "LanguageHead",
    "as_language_head",
    "summed_loss",
    "supervised_rows",
]

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""
LOGITS_AT_ONCE = 1 << 26  # 256 MiB in float32


class LanguageHead(nn.Linear):
    """A linear layer onto the vocabulary that can also score targets.

    With targets it works through the rows in chunks whose logits are computed again in the
    backward pass, so at most 2**26 logits exist at a time. All of it is one call of the module:
    under ZeRO-3 the weight is gathered once, however many rows a rank has.

    Args:
        in_features: width of the rows.
        out_features: size of the vocabulary.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, rows: Tensor, targets: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits, or the summed cross entropy.

        Args:
            rows: (..., D) hidden states; with targets (N, D).
            targets: (N,) token ids; N may be 0.

        Returns:
            (..., vocabulary), or a float32 scalar: the sum over rows of the cross entropy.
        """
        if targets is None:
            return super().forward(rows)
        at_once = max(1, LOGITS_AT_ONCE // self.out_features)
        if len(rows) <= at_once:
            return self._loss(rows, targets)
        parts = zip(rows.split(at_once), targets.split(at_once), strict=True)
        losses = [checkpoint(self._loss, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum()

    def _loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        logits = super().forward(rows).float()
        return nn.functional.cross_entropy(logits, targets, reduction="sum")


def as_language_head(linear: nn.Linear) -> LanguageHead:
    """The same weights as a ``LanguageHead``."""
    with torch.device("meta"):
        head = LanguageHead(linear.in_features, linear.out_features)
    head.weight, head.bias = linear.weight, linear.bias
    return head.train(linear.training)


def summed_loss(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of rows (N, D) and targets (N,), in float32.

    A head that something has wrapped, an adapter for one, is asked for logits, all at once.
    """
    if isinstance(head, LanguageHead):
        return head(rows, targets)
    return nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum")


def supervised_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that predict a supervised token, and the tokens.

    Args:
        hidden: (B, S, D) last hidden states.
        labels: (B, S) token ids, -100 where nothing is supervised.

    Returns:
        (N, D) hidden states and (N,) token ids: row i predicts label i + 1.
    """
    targets = labels[:, 1:].to(hidden.device)
    chosen = targets != IGNORE_INDEX
    return hidden[:, :-1][chosen], targets[chosen]
