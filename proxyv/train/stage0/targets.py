"""What is in each patch of a page: the characters whose centres lie in it, and its colours.

Both halves of stage 0 read pages this way. The vision tower learns to predict it from pixels; the
language model is pretrained on it directly, in place of a picture.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proxyv.synthetic.page import Glyph

__all__ = [
    "ALPHABET",
    "BLANK",
    "CELLS",
    "GRID",
    "PAGE_HW",
    "PATCH_PX",
    "SLOTS",
    "colour_cells",
    "glyph_array",
    "patch_targets",
    "to_tensor",
]

PAGE_HW = (168, 168)
PATCH_PX = 14
GRID = PAGE_HW[0] // PATCH_PX  # patches on a side

ALPHABET = "".join(chr(code) for code in range(33, 127))
BLANK = 0  # class of an empty slot; character i of the alphabet is class i + 1
SLOTS = 6  # characters that a patch can name: two lines of three at the smallest size
CELLS = 4  # a patch is described by CELLS x CELLS mean colours

_CLASS = {char: index + 1 for index, char in enumerate(ALPHABET)}
_LINE_GAP_PX = 4.0


def glyph_array(glyphs: list[Glyph]) -> np.ndarray:
    """(G, 3) float32: class, x, y of every glyph that the alphabet knows."""
    rows = [(_CLASS[glyph.char], glyph.x, glyph.y) for glyph in glyphs if glyph.char in _CLASS]
    return np.array(rows, dtype=np.float32).reshape(-1, 3)


def patch_targets(glyphs: np.ndarray, grid_hw: tuple[int, int], patch_px: int) -> np.ndarray:
    """The characters of every patch, in reading order.

    Args:
        glyphs: (G, 3) class, x, y in pixels.
        grid_hw: patches per column and per row.
        patch_px: patch side in pixels.

    Returns:
        (H*W, SLOTS) int64 classes, ``BLANK`` where a slot is empty. Glyphs outside the page and
        characters beyond the last slot are left out.
    """
    height, width = grid_hw
    slots = np.full((height * width, SLOTS), BLANK, dtype=np.int64)
    if not len(glyphs):
        return slots
    row = np.floor(glyphs[:, 2] / patch_px).astype(int)
    column = np.floor(glyphs[:, 1] / patch_px).astype(int)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    glyphs, patch = glyphs[inside], (row * width + column)[inside]
    order = np.lexsort((glyphs[:, 1], glyphs[:, 2], patch))
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and patch[order[stop]] == patch[order[start]]:
            stop += 1
        members = glyphs[order[start:stop]]  # sorted by y; lines are apart by a gap
        line = np.cumsum(np.diff(members[:, 2], prepend=members[0, 2]) > _LINE_GAP_PX)
        classes = members[np.lexsort((members[:, 1], line)), 0][:SLOTS]
        slots[patch[order[start]], : len(classes)] = classes
        start = stop
    return slots


def colour_cells(images: Tensor, patch_px: int) -> Tensor:
    """Mean colours of each patch's cells.

    Args:
        images: (B, 3, H, W) in [0, 1].
        patch_px: patch side in pixels.

    Returns:
        (B, H/patch * W/patch, 3*CELLS*CELLS) in [-1, 1].
    """
    B, _, height, width = images.shape
    rows, columns = height // patch_px, width // patch_px
    cells = F.interpolate(images, (rows * CELLS, columns * CELLS), mode="area")
    cells = cells.view(B, 3, rows, CELLS, columns, CELLS).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(B, rows * columns, 3 * CELLS * CELLS) * 2 - 1


def to_tensor(images: np.ndarray, device: torch.device | None = None) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float in [0, 1]."""
    return torch.tensor(images, device=device).permute(0, 3, 1, 2).float() / 255
