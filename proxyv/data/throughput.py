"""How fast rows become batches, by number of loading processes, and how much memory waits ready."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from proxyv.data.collator import Collator
from proxyv.data.dataset import ConversationDataset
from proxyv.data.sampler import RowSampler

__all__ = ["Throughput", "measure_throughput"]


@dataclass(frozen=True)
class Throughput:
    """Speed of one number of processes.

    Attributes:
        workers: loading processes; 0 loads in the process that trains.
        rows_per_second: of all processes together.
        rows_per_second_per_worker: of one.
        tokens_per_second: padding not counted.
        batch_bytes: the largest batch.
        prefetch_bytes: most that waits ready: workers x prefetch x the largest batch.
    """

    workers: int
    rows_per_second: float
    rows_per_second_per_worker: float
    tokens_per_second: float
    batch_bytes: int
    prefetch_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def measure_throughput(
    dataset: ConversationDataset,
    collator: Collator,
    batch_size: int,
    workers: int,
    batches: int,
    prefetch: int,
) -> Throughput:
    """Load batches and time them.

    Starting the processes is not counted: the clock runs from the first batch of each process on.

    Args:
        dataset: the rows, taken in random order.
        collator: makes batches.
        batch_size: rows of a batch.
        workers: processes; 0 loads here.
        batches: batches to time.
        prefetch: batches that each process keeps ready.

    Raises:
        ValueError: the set has too few rows for so many batches.
    """
    skipped = max(workers, 1)
    if len(dataset) < batch_size * (batches + skipped):
        raise ValueError(
            f"--batches {batches}: {batches} batches of {batch_size} rows after {skipped} to warm "
            f"up need more than the {len(dataset)} rows there are; use fewer or smaller batches"
        )
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=RowSampler(len(dataset), seed=0),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=collator,
    )
    rows = tokens = largest = 0
    began = 0.0
    for number, batch in enumerate(loader):
        if number >= skipped:
            rows += len(batch["input_ids"])
            tokens += int(batch["attention_mask"].sum())
        largest = max(largest, _bytes(batch))
        if number == skipped - 1:
            began = time.perf_counter()
        if number == skipped + batches - 1:
            break
    seconds = time.perf_counter() - began
    return Throughput(
        workers=workers,
        rows_per_second=round(rows / seconds, 2),
        rows_per_second_per_worker=round(rows / seconds / max(workers, 1), 2),
        tokens_per_second=round(tokens / seconds, 1),
        batch_bytes=largest,
        prefetch_bytes=workers * prefetch * largest,
    )


def _bytes(batch: dict[str, Any]) -> int:
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
