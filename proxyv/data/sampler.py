"""The order of rows: a pure function of seed and epoch, with like rows side by side.

Every rank computes the same order for itself, nothing depends on what was drawn before, and so a
run goes on by skipping as many batches as it had done. ``accelerate`` deals consecutive
micro-batches to the ranks in turn and calls ``set_epoch``.

Source: authors' ``LengthGroupedSampler`` (``llava_trainer.py``). Differs: lengths are real token
counts, images included; the order has its own seed instead of the global generator; rows are
sorted in pools larger than one global batch, so that those of a micro-batch are really alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

__all__ = ["WINDOW_ROWS", "GroupedSampler", "LaneSampler", "RowSampler"]

WINDOW_ROWS = 1024
"""Streamed rows that one process keeps at hand, and draws the next from."""


class RowSampler(Sampler[int]):
    """Every row once, in random order.

    Args:
        rows: rows of the set.
        seed: of the order; ``set_epoch`` gives every pass its own.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass that iterating gives the order of."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Row numbers of the chosen pass."""
        yield from self.order(self.epoch).tolist()

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of a pass, (rows,) int64: the same whenever and wherever it is asked for."""
        return self._generator(epoch).permutation(self.rows)

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])


class GroupedSampler(RowSampler):
    """Rows of like length and of one kind (with images, or text alone) side by side.

    A *round* is what all ranks work on at the same time: ``ranks`` micro-batches. Rows of a round
    are neighbours in length, so no rank waits for another and little is padding; the rounds
    themselves come in random order, so that an optimiser step of several rounds sees long and
    short rows. The round with the longest row comes first: what does not fit into memory fails at
    once. Rows that fill no round (fewer than two rounds' worth) come last.

    Args:
        lengths: (rows,) tokens of each row, those of its images included.
        has_image: (rows,) whether a row has images.
        micro_batch: rows of one rank at a time.
        ranks: ranks that work at the same time.
        seed: of the order.
        pool_rounds: rounds that are sorted together. More means less padding; fewer, company that
            changes more from pass to pass.

    Raises:
        ValueError: lengths and kinds differ in number, or a size is less than 1.
    """

    def __init__(
        self,
        lengths: Any,
        has_image: Any,
        micro_batch: int,
        ranks: int,
        seed: int,
        pool_rounds: int = 64,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.has_image = np.asarray(has_image, dtype=bool)
        if self.lengths.ndim != 1 or self.lengths.shape != self.has_image.shape:
            raise ValueError(
                f"lengths of shape {self.lengths.shape} and has_image of shape "
                f"{self.has_image.shape}: give one of each for every row"
            )
        for name, size in (
            ("micro_batch", micro_batch),
            ("ranks", ranks),
            ("pool_rounds", pool_rounds),
        ):
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1")
        super().__init__(len(self.lengths), seed)
        self.round_rows, self.pool_rounds = micro_batch * ranks, pool_rounds

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of a pass, (rows,) int64."""
        generator = self._generator(epoch)
        rounds, rest = [], []
        for kind in (True, False):
            rows = generator.permutation(np.flatnonzero(self.has_image == kind))
            full = len(rows) // self.round_rows * self.round_rows
            step = self.pool_rounds * self.round_rows
            for start in range(0, full, step):
                pool = self._longest_first(rows[start : min(start + step, full)])
                rounds.append(pool.reshape(-1, self.round_rows))
            rest.append(self._longest_first(rows[full:]))
        if not rounds:
            return np.concatenate(rest)
        whole = generator.permutation(np.concatenate(rounds))
        longest = int(self.lengths[whole].max(axis=1).argmax())
        whole[[0, longest]] = whole[[longest, 0]]
        return np.concatenate([whole.ravel(), *rest])

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]


class LaneSampler(RowSampler):
    """Every row once, in an order in which each process reads its own blocks, one after another.

    A *lane* is what one data-loading process reads: batches are dealt to ranks in turn, and those
    of a rank to its workers, so every ``lanes``-th micro-batch goes to the same process. Blocks are
    drawn in random order and dealt to the lanes; within a lane, rows are drawn from a window of
    as many blocks as make :data:`WINDOW_ROWS`. An optimiser step mixes the rows of all lanes.
    When the shorter lanes are through, the rest of the others comes last.

    Args:
        blocks: (rows,) numbers, alike for rows that are read together.
        micro_batch: rows of one rank at a time.
        lanes: ranks x data-loading processes of each.
        seed: of the order.
    """

    def __init__(self, blocks: np.ndarray, micro_batch: int, lanes: int, seed: int) -> None:
        super().__init__(len(blocks), seed)
        by_block = np.argsort(blocks, kind="stable")
        self._blocks = np.split(by_block, np.flatnonzero(np.diff(blocks[by_block])) + 1)
        self.micro_batch, self.lanes = micro_batch, lanes

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of a pass, (rows,) int64."""
        generator, size = self._generator(epoch), self.micro_batch
        dealt: list[list[np.ndarray]] = [[] for _ in range(self.lanes)]
        held = [0] * self.lanes
        for block in generator.permutation(len(self._blocks)):
            shortest = held.index(min(held))
            dealt[shortest].append(self._blocks[block])
            held[shortest] += len(self._blocks[block])
        lanes = [_draw(lane, generator) for lane in dealt if lane]
        rounds = min(len(lane) for lane in lanes) // size if len(lanes) == self.lanes else 0
        even = np.stack([lane[: rounds * size].reshape(rounds, size) for lane in lanes], axis=1)
        return np.concatenate([even.ravel(), *(lane[rounds * size :] for lane in lanes)])


def _draw(blocks: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Rows of some blocks, in random order within windows of them."""
    drawn, window, rows = [], [], 0
    for number, block in enumerate(blocks, start=1):
        window.append(block)
        rows += len(block)
        if rows >= WINDOW_ROWS or number == len(blocks):
            drawn.append(generator.permutation(np.concatenate(window)))
            window, rows = [], 0
    return np.concatenate(drawn)
