"""The page as the tiny language model learns it: each patch one embedding, looked up, not seen.

What is written and painted in a patch is known for a page of the small world, so its embedding can
be a sum from tables. The language model is pretrained on such pages; the vision tower learns to
say the same embedding from pixels (by a linear head on its features), so that a projector has
little left to find. The tables themselves are thrown away.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from proxyv.train.stage0.loop import HEAD_FILE
from proxyv.train.stage0.targets import ALPHABET, BLANK, CELLS, SLOTS, colour_cells

__all__ = ["PageTable"]


class PageTable(nn.Module):
    """Embeds pages given as characters and colours.

    Args:
        width: of the language model.
        grid_hw: patches of a full page.
        patch_px: patch side in pixels.
    """

    def __init__(self, width: int, grid_hw: tuple[int, int], patch_px: int) -> None:
        super().__init__()
        self.rows, self.columns = grid_hw
        self.patch_px = patch_px
        self.slots = nn.Embedding(SLOTS * (len(ALPHABET) + 1), width)
        nn.init.normal_(self.slots.weight, std=0.05)
        self.cells = nn.Linear(3 * CELLS * CELLS, width, bias=False)
        nn.init.normal_(self.cells.weight, std=0.02)
        # A place is its row plus its column: what stands above what must not be learned patch by
        # patch. A tower's features know it too.
        self.row_places = nn.Embedding(self.rows, width)
        self.column_places = nn.Embedding(self.columns, width)
        for places in (self.row_places, self.column_places):
            nn.init.normal_(places.weight, std=0.12)  # with less, columns are hard to learn
        self.newline = nn.Parameter(torch.randn(width) * 0.02)

    @classmethod
    def of_language(cls, folder: Path, grid_hw: tuple[int, int], patch_px: int) -> PageTable:
        """The frozen table that a language model was pretrained with (see ``save_bf16``).

        Raises:
            ValueError: the folder holds no table.
        """
        saved = load_file(folder / HEAD_FILE)
        prefix = "table."
        state = {n.removeprefix(prefix): v for n, v in saved.items() if n.startswith(prefix)}
        if "newline" not in state:
            raise ValueError(
                f"{folder / HEAD_FILE} holds no page table (found {sorted(saved)}); train it with "
                "`python -m proxyv.train.stage0 language`"
            )
        table = cls(len(state["newline"]), grid_hw, patch_px)
        table.load_state_dict(state)
        return table.float().requires_grad_(False)

    def forward(self, slots: Tensor, images: Tensor, first_row: int = 0) -> Tensor:
        """Embed pages as a projector would.

        Args:
            slots: (B, N, SLOTS) classes.
            images: (B, 3, H, W) pixels in [0, 1].
            first_row: the row of the full page that a strip's first row takes.

        Returns:
            (B, N, width).
        """
        last_row = first_row + slots.shape[1] // self.columns
        rows = torch.arange(first_row, last_row, device=slots.device)
        offsets = torch.arange(SLOTS, device=slots.device) * (len(ALPHABET) + 1)
        written = self.slots(slots + offsets) * (slots != BLANK).unsqueeze(-1)
        places = self.row_places(rows)[:, None] + self.column_places.weight  # (rows, columns, D)
        colours = colour_cells(images, self.patch_px)
        # Relative to the paper: else its constant colour drowns what is written on it.
        colours = colours - colours.median(dim=1, keepdim=True).values
        return written.sum(2) + self.cells(colours) + places.flatten(0, 1)
