"""An endless, seeded supply of small-world pages for stage 0.

Drawing a page costs as much as training on it, so pages live in a ring that is renewed a few at a
time; each use shifts the page by some pixels, which moves every character within its patch, and
may stretch and slant it, which makes new typefaces of the few that there are, and tint it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
from PIL import Image

from proxyv.synthetic.page import Page, Split
from proxyv.synthetic.world import Mix, draw_page
from proxyv.train.stage0.targets import glyph_array, patch_targets

__all__ = ["PageRing", "held_out", "tinted", "warped"]


START_PAGES = 1000  # what training begins with


def _draw_many(
    seeds: list[tuple[int, ...]], split: Split, mix: Mix, size_hw: tuple[int, int]
) -> list[Page]:
    return [draw_page(seed, split, mix, size_hw) for seed in seeds]


class PageRing:
    """Pages that are drawn once, used several times and then replaced.

    Args:
        seed: stream of pages; stage 0 trains on its own seeds, the data sets use others.
        capacity: pages held at a time.
        mix: what kinds of page, in what shares.
        size_hw: height and width of a page in pixels.
        workers: processes that draw pages beside the training (0: none, draw in place); with
            more than one, each draws as many a step.
    """

    def __init__(
        self, seed: int, capacity: int, mix: Mix, size_hw: tuple[int, int], workers: int = 0
    ) -> None:
        self.seed, self.capacity, self.mix, self.size_hw = seed, capacity, mix, size_hw
        self.drawn = 0
        self._next = 0
        self.pages: list[Page] = []
        self.arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self.workers = workers
        self._pool = ProcessPoolExecutor(workers) if workers else None
        self._pending: list[Future[list[Page]]] = []

    def _seeds(self, count: int) -> list[tuple[int, ...]]:
        seeds: list[tuple[int, ...]] = [(self.seed, self.drawn + i) for i in range(count)]
        self.drawn += count
        return seeds

    def _store(self, pages: list[Page]) -> None:
        for page in pages:
            item = (np.asarray(page.image, dtype=np.uint8), glyph_array(page.glyphs))
            if len(self.pages) < self.capacity:
                self.pages.append(page)
                self.arrays.append(item)
            else:
                slot = self._next
                self.pages[slot], self.arrays[slot] = page, item
                self._next = (slot + 1) % self.capacity

    def fill(self) -> None:
        """Draw pages to begin with; ``renew`` adds more until the ring is full."""
        missing = min(self.capacity, START_PAGES) - len(self.pages)
        if self.workers < 2:  # one would only take turns with the caller
            self._store(_draw_many(self._seeds(missing), "train", self.mix, self.size_hw))
            return
        each = -(-missing // self.workers)
        for job in [self._draw(min(each, missing - n)) for n in range(0, missing, each)]:
            self._store(job.result())

    def renew(self, count: int) -> None:
        """Add pages, then replace the oldest; a worker's arrive when they are ready."""
        if self._pool is None:
            self._store(_draw_many(self._seeds(count), "train", self.mix, self.size_hw))
            return
        for _ in range(self.workers):
            if len(self._pending) < 4 * self.workers:
                self._pending.append(self._draw(count))
            if self._pending[0].done():
                self._store(self._pending.pop(0).result())

    def advance(self, step: int, count: int) -> None:
        """What a training step does to the ring: fill it at first, then renew some pages.

        Args:
            step: of the training; a resumed run goes on to new pages.
            count: pages to draw a step.
        """
        if not self.pages:
            self.drawn = step * count
            self.fill()
        self.renew(count)

    def _draw(self, count: int) -> Future[list[Page]]:
        """Let a worker draw so many pages."""
        assert self._pool is not None, "nobody draws beside the training"
        return self._pool.submit(_draw_many, self._seeds(count), "train", self.mix, self.size_hw)

    def batch(
        self,
        rng: np.random.Generator,
        size: int,
        patch_px: int,
        shift_px: int,
        stretch: float = 0.0,
        tint: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray, list[Page]]:
        """Draw a batch of pages, each seen a little differently (see ``warped``, ``tinted``).

        Returns:
            images (B, H, W, 3) uint8, targets (B, patches, SLOTS) int64, and the pages.
        """
        chosen = rng.integers(len(self.pages), size=size)
        grid = (self.size_hw[0] // patch_px, self.size_hw[1] // patch_px)
        images, targets = [], []
        for index in chosen:
            image, glyphs = self.arrays[index]
            image, glyphs = warped(image, glyphs, rng, shift_px, stretch)
            if rng.random() < tint:
                image = tinted(image, rng)
            images.append(image)
            targets.append(patch_targets(glyphs, grid, patch_px))
        return np.stack(images), np.stack(targets), [self.pages[i] for i in chosen]


def warped(
    image: np.ndarray,
    glyphs: np.ndarray,
    rng: np.random.Generator,
    shift_px: int,
    stretch: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Shift a page in both directions, and stretch and slant it; the border repeats its edge.

    Args:
        image: (H, W, 3) uint8.
        glyphs: (G, 3) class, x, y.
        rng: source of randomness.
        shift_px: largest shift.
        stretch: height and width grow by up to 1.5 times this share or shrink by it, each for
            itself; lines slant by up to as many pixels a pixel.
    """
    height, width = image.shape[:2]
    move = rng.integers(-shift_px, shift_px + 1, size=2).astype(np.float64)  # x, y
    if stretch == 0.0:
        dx, dy = move.astype(int)
        rows = np.clip(np.arange(height) - dy, 0, height - 1)
        columns = np.clip(np.arange(width) - dx, 0, width - 1)
        return image[rows][:, columns], glyphs + np.array([0, *move], dtype=np.float32)
    scale = 1 + rng.uniform(-stretch, 1.5 * stretch, size=2)
    slant = rng.uniform(-stretch, stretch)
    forward = np.array([[scale[0], slant], [0.0, scale[1]]])
    middle = np.array([width / 2, height / 2])
    back = np.linalg.inv(forward)
    margin = int(0.5 * max(height, width) * 3 * stretch) + shift_px + 2
    padded = Image.fromarray(np.pad(image, ((margin, margin), (margin, margin), (0, 0)), "edge"))
    start = middle - back @ (middle + move) + margin  # where the result's origin comes from
    coefficients = (*back[0], start[0], *back[1], start[1])
    size, affine, smooth = (width, height), Image.Transform.AFFINE, Image.Resampling.BICUBIC
    bent = np.asarray(padded.transform(size, affine, coefficients, smooth))
    moved = glyphs.copy()
    moved[:, 1:] = (glyphs[:, 1:] - middle) @ forward.T + middle + move
    return bent, moved


def tinted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Print a page on other paper with another ink: black and white become two drawn colours.

    In one case of four the ink is lighter than the paper. (H, W, 3) uint8 to the same.
    """
    paper, ink = rng.uniform(150, 255, size=3), rng.uniform(0, 90, size=3)
    if rng.random() < 0.25:
        paper, ink = ink, paper
    return (ink + (paper - ink) * (image / 255.0)).round().astype(np.uint8)


def held_out(
    count: int, seed: int, split: Split, mix: Mix, size_hw: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray, Page]]:
    """Pages for measuring, never used for training: image, glyphs, page."""
    for index in range(count):
        page = draw_page((seed, index), split, mix, size_hw)
        yield np.asarray(page.image, dtype=np.uint8), glyph_array(page.glyphs), page
