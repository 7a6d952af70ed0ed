"""Rows of parquet files as they come, for a set that is not to be copied to this machine first.

Source: no counterpart in the authors' code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from proxyv.data.collator import Sample
from proxyv.data.images import ImageFolder
from proxyv.data.pipeline import ImagePipeline, RowPipeline
from proxyv.data.rows import parse_row
from proxyv.data.sources import parquet_files
from proxyv.data.templates import Renderer

__all__ = ["ConversationStream"]


class ConversationStream(RowPipeline, IterableDataset[Sample]):
    """Samples of parquet files, from the hub or from disk, read once from front to back.

    ``datasets`` reads; nothing but a buffer of rows is held. Each rank reads its own shards (or,
    where the number of ranks does not divide that of the files, its own rows), and within a rank
    each data-loading worker its own files: have at least ranks x workers files. The stream already
    gives each rank its own part, so it must not be dealt out a second time (with ``accelerate``:
    do not prepare the loader). Lengths are not known beforehand, so rows are not grouped by
    length, and a run over a stream counts steps, not passes.

    Args:
        path: a parquet file, a folder of them, or an id on the hub.
        folder: the size limit of images.
        renderer: makes ids and labels.
        images: makes crops.
        max_length: longest row in tokens.
        on_failure: ``raise`` or ``skip``, see :class:`RowPipeline`.
        seed: of the order; ``set_epoch`` gives every pass its own.
        buffer: rows among which the next is drawn; the order of files is drawn as well.
        rank: number of this rank.
        ranks: ranks that share the stream.

    Raises:
        FileNotFoundError: a folder without parquet files.
    """

    def __init__(
        self,
        path: str,
        folder: ImageFolder,
        renderer: Renderer,
        images: ImagePipeline,
        max_length: int,
        on_failure: str = "raise",
        *,
        seed: int = 42,
        buffer: int = 1000,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        import datasets
        from datasets.distributed import split_dataset_by_node

        super().__init__(renderer, images, max_length, on_failure)
        self.path, self.folder = path, folder
        if Path(path).exists():
            files = [str(file) for file in parquet_files(path)]
            table = datasets.load_dataset(
                "parquet", data_files=files, split="train", streaming=True
            )
        else:
            table = datasets.load_dataset(path, split="train", streaming=True)
        for name, feature in (table.features or {}).items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        table = table.shuffle(seed=seed, buffer_size=buffer)
        self._table = split_dataset_by_node(table, rank=rank, world_size=ranks)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass, and with it the order."""
        self._table.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in the process that reads it.

        Rows that lay in the buffer are not read again: going on leaves out up to ``buffer`` rows.
        """
        return self._table.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place that :meth:`state_dict` gave."""
        self._table.load_state_dict(state)

    def __iter__(self) -> Iterator[Sample]:
        """Samples in order."""
        file = f"{self.path} (streamed)"
        for number, record in enumerate(self._table):
            yield self.sample(functools.partial(parse_row, record, file, number, self.folder))
