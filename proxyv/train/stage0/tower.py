"""Stage 0, vision: teach a CLIP-architecture tower to read, by dense supervision.

Heads on the tower's last layer predict, for each patch, the characters whose centres lie in it,
the colours of its cells, where the patch is, and the embedding by which the tiny language model
knows such a patch; the heads are thrown away. The language model's loss alone would teach a raw
tower to read far more slowly (see docs/log.md).

    python -m proxyv.train.stage0 tower --run runs/tower --steps 9000
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from proxyv.synthetic.page import Split
from proxyv.synthetic.world import Mix
from proxyv.train.stage0.loop import (
    Optimisers,
    PartSettings,
    Trainee,
    load_bf16,
    run_loop,
    save_bf16,
)
from proxyv.train.stage0.page_table import PageTable
from proxyv.train.stage0.pages import PageRing, held_out
from proxyv.train.stage0.targets import (
    ALPHABET,
    BLANK,
    CELLS,
    GRID,
    PAGE_HW,
    PATCH_PX,
    SLOTS,
    colour_cells,
    patch_targets,
    to_tensor,
)

SPLITS: tuple[Split, ...] = ("train", "test")

__all__ = ["TowerSettings", "tower_config", "train_tower"]


def tower_config() -> CLIPVisionConfig:
    """The tiny tower: 2.8 M parameters, 168 px, patch 14, 144 patches."""
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=168,
        patch_size=PATCH_PX,
        hidden_act="gelu",
    )


@dataclass(frozen=True)
class TowerSettings(PartSettings):
    """How the tower is trained.

    Attributes:
        init: an earlier tower to start from.
        language: folder of the language model whose page table it learns to say.
        stretch: see ``warped``.
        tint: share of the pages that are printed in other colours.
        mix: kinds of page.
    """

    steps: int = 9000
    seed: int = 11
    ring: int = 6000
    held: int = 96
    init: Path | None = None
    language: Path = Path("data/tiny/language")
    stretch: float = 0.1
    tint: float = 0.5
    mix: Mix = field(default_factory=lambda: Mix(text=0.35, documents=0.3, charts=0.35))


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to CLIP's mean and deviation."""
    mean = images.new_tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1)
    std = images.new_tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    return (images - mean) / std


class ReadingTower(Trainee):
    """The tower with the head that is thrown away."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        config = tower_config()
        self.settings = settings
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.read = nn.Linear(config.hidden_size, SLOTS * (len(ALPHABET) + 1))
        self.paint = nn.Linear(config.hidden_size, 3 * CELLS * CELLS)
        self.place = nn.Linear(config.hidden_size, 2 * GRID)  # row and column of the patch
        table = PageTable.of_language(settings.language, (GRID, GRID), PATCH_PX)
        # In a tuple it is no part of what is trained and saved.
        self.target = (table.to(settings.device),)
        self.embed = nn.Linear(config.hidden_size, len(table.newline))
        self.to(settings.device)
        self.ring = PageRing(settings.seed, settings.ring, settings.mix, PAGE_HW, settings.workers)
        kinds = {"documents": Mix(0, 1, 0), "charts": Mix(0, 0, 1)}
        self.held = {
            f"{kind}_{split}": list(
                held_out(settings.held, 900 + settings.seed, split, mix, PAGE_HW)
            )
            for kind, mix in kinds.items()
            for split in SPLITS
        }

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to what a projector would get: (B, N, hidden)."""
        return self.tower(normalise(images)).last_hidden_state[:, 1:]

    def letters(self, features: Tensor) -> Tensor:
        """Logits of the characters in each patch: (B, N, SLOTS, V)."""
        return self.read(self.norm(features)).view(*features.shape[:2], SLOTS, -1)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        self.ring.advance(step, settings.renew)
        rng = np.random.default_rng((settings.seed, step))
        pixels, slots, _ = self.ring.batch(
            rng, settings.batch, PATCH_PX, 7, settings.stretch, settings.tint
        )
        images = to_tensor(pixels, self.device)
        with self.autocast():
            features = self.features(images)
        return self.supervise(features, images, torch.from_numpy(slots).to(self.device))

    def supervise(
        self, features: Tensor, images: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """What the heads should say of pages, as a loss.

        Args:
            features: (B, N, hidden) of the pages.
            images: (B, 3, H, W) in [0, 1].
            target: (B, N, SLOTS) classes of the characters.
        """
        with self.autocast():
            logits, normed = self.letters(features), self.norm(features)
            cells, places = self.paint(normed), self.place(normed)
            said = self.embed(features)  # linear and not normed: as near as a projector can start
        inked = target != BLANK
        reading = F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), reduction="sum")
        painting = F.mse_loss(cells.float(), colour_cells(images, PATCH_PX))
        here = torch.arange(GRID * GRID, device=self.device)
        where = torch.stack([here // GRID, here % GRID], dim=1).expand(len(images), -1, -1)
        placing = F.cross_entropy(places.reshape(-1, GRID).float(), where.flatten())
        wanted = self.target[0](target, images)
        unexplained = F.mse_loss(said.float(), wanted) / wanted.var(dim=(0, 1)).mean()
        size = features.float().square().mean()  # a projector expects features of unit size
        loss = (
            reading / inked.sum() + painting + 0.1 * placing + unexplained + 0.1 * (size - 1) ** 2
        )
        return loss, {
            "right": (logits.argmax(-1) == target)[inked].float().mean().item(),
            "painting": painting.item(),
            "placing": placing.item(),
            "unexplained": unexplained.item(),
            "size": size.item(),
        }

    def measure(self) -> dict[str, float]:
        """Share of characters right, in place and order, on pages never trained on."""
        scores = {}
        for name, pages in self.held.items():
            hits = total = 0
            for start in range(0, len(pages), 32):
                part = pages[start : start + 32]
                target = torch.from_numpy(
                    np.stack(
                        [patch_targets(glyphs, (GRID, GRID), PATCH_PX) for _, glyphs, _ in part]
                    )
                ).to(self.device)
                images = to_tensor(np.stack([image for image, _, _ in part]), self.device)
                logits = self.letters(self.features(images))
                inked = target != BLANK
                hits += int((logits.argmax(-1) == target)[inked].sum())
                total += int(inked.sum())
            scores[name] = hits / total
        return scores


def train_tower(settings: TowerSettings) -> None:
    """Train, resuming where a run stopped, and write the tower to ``settings.out`` in bf16."""
    trainee = ReadingTower(settings)
    if settings.init:
        load_bf16(trainee, "tower", settings.init)
    run_loop(
        trainee,
        Optimisers(trainee, matrix_rate=2e-3, other_rate=1e-3),
        settings.run,
        steps=settings.steps,
        warmup=200,
        # What an earlier run has learned is at its best again only late in the fall.
        cooldown=0.75 if settings.init else 0.35,
        measure_every=500,
        save_every=250,
    )
    save_bf16(trainee, "tower", settings.out)
