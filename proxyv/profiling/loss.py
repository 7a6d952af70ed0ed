"""What the loss costs: logits of every row, as stock models make them, or of supervised rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from proxyv.config import ProxyVConfig
from proxyv.model.flops import RowTokens
from proxyv.model.head import IGNORE_INDEX, LanguageHead, supervised_rows
from proxyv.profiling.measure import peak_memory, time_interleaved
from proxyv.profiling.report import Plot, Report

__all__ = ["all_rows_loss", "loss_report", "supervised_loss"]


def all_rows_loss(head: LanguageHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy by way of all logits, (B, S, D) and (B, S) to a scalar."""
    logits = head(hidden)[:, :-1].float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )


def supervised_loss(head: LanguageHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """The same by way of the logits of supervised rows, in chunks."""
    rows, targets = supervised_rows(hidden, labels)
    return head(rows, targets) / len(targets)


def loss_report(
    config: ProxyVConfig,
    row: RowTokens,
    batch: int,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Report:
    """Time and peak memory of the head's forward and backward pass.

    Args:
        config: of the model; only the head is built, on random weights.
        row: what each row of the batch holds; the second half of its text is supervised.
        batch: rows.
        repeats: measured rounds, after one to warm up.
        dtype: of weights and rows.
        device: where they lie.
    """
    text = config.text_config
    length = row.crops * config.rows_per_crop + row.text
    with device:
        head = LanguageHead(text.hidden_size, text.vocab_size).to(dtype)
        hidden = torch.randn(batch, length, text.hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.randint(text.vocab_size, (batch, length))
    supervised = max(1, row.text // 2)
    labels[:, :-supervised] = IGNORE_INDEX

    def step(loss: Callable[..., Tensor]) -> None:
        head.weight.grad = hidden.grad = None
        loss(head, hidden, labels).backward()

    ways = {"logits of all rows": all_rows_loss, "supervised rows": supervised_loss}
    works = {name: partial(step, loss) for name, loss in ways.items()}
    peaks = {name: peak_memory(work, device) for name, work in works.items()}
    timings = time_interleaved(works, device, repeats)
    first = timings["logits of all rows"]
    rows: list[dict[str, Any]] = [
        {
            "loss by": name,
            "median ms": 1000 * timing.median,
            "spread ms": 1000 * timing.spread,
            "time ratio": timing.over(first),
            "peak MiB": peaks[name] / (1 << 20),
            "peak ratio": peaks[name] / peaks["logits of all rows"],
        }
        for name, timing in timings.items()
    ]
    return Report(
        name="loss",
        title=f"The loss of a training step: {batch} x {length} rows of D {text.hidden_size}, "
        f"{batch * supervised} supervised, vocabulary {text.vocab_size}, "
        f"{str(dtype).removeprefix('torch.')}",
        rows=rows,
        notes="Forward and backward of the head alone. Peak above weights, gradients included.",
        plot=Plot(
            x=["time", "peak"],
            series={line["loss by"]: [line["time ratio"], line["peak ratio"]] for line in rows},
            y_label="ratio to logits of all rows",
        ),
    )
