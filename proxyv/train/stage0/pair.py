"""Stage 0, pair: tower, projector and language model trained on together, on pages as pictures.

The language model has learned to answer from pages without a fault, and the tower to say what such
pages hold; where the tower errs, neither knows. Here answers are asked of what the tower sees, so
that the language model learns which of its letters to doubt and the tower which of its errors
cost an answer, while its heads keep it reading. Plays the part of the pretraining that real LLaVA
finds done in CLIP and Vicuna; the layers are still ordinary ones, ProxyV comes in stage 1.

    python -m proxyv.train.stage0 pair --run runs/pair --steps 4000
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from proxyv.synthetic.world import Mix
from proxyv.train.stage0.language import GridReader, LanguageSettings, Phase
from proxyv.train.stage0.loop import (
    Optimisers,
    PartSettings,
    Trainee,
    load_bf16,
    run_loop,
    save_bf16,
)
from proxyv.train.stage0.projector import Projector
from proxyv.train.stage0.targets import PAGE_HW, to_tensor
from proxyv.train.stage0.tokenizer import save_tokenizer
from proxyv.train.stage0.tower import ReadingTower, TowerSettings

__all__ = ["PairSettings", "train_pair"]

MIX = Mix(0.04, 0.32, 0.5, 0.08, 0.06, chart_questions=(6, 10))


@dataclass(frozen=True)
class PairSettings(PartSettings):
    """How the pair is trained.

    Attributes:
        init: folder with ``language``, ``vision`` and ``projector.safetensors`` to start from;
            ``out`` gets the same.
        stretch: see ``warped``.
    """

    steps: int = 4000
    batch: int = 12
    seed: int = 51
    renew: int = 6
    init: Path = Path("data/tiny")
    stretch: float = 0.04


class ReadingPair(Trainee):
    """Tower, projector and language model, with the heads that are thrown away."""

    def __init__(self, settings: PairSettings) -> None:
        super().__init__()
        self.settings = settings
        self.reader = GridReader(
            LanguageSettings(
                settings.run,
                settings.out,
                phases=(Phase(0, PAGE_HW, settings.batch, MIX),),
                seed=settings.seed,
                ring=settings.ring,
                renew=settings.renew,
                workers=settings.workers,
                device=settings.device,
                held=settings.held,
                stretch=settings.stretch,
            )
        )
        self.vision = ReadingTower(
            TowerSettings(
                settings.run,
                settings.out,
                seed=settings.seed,
                workers=0,
                device=settings.device,
                held=settings.held,
                language=settings.init / "language",
            )
        )
        load_bf16(self.reader, "language", settings.init / "language")
        load_bf16(self.vision, "tower", settings.init / "vision")
        self.reader.table.requires_grad_(False)  # says what a page is, to the tower's head
        features, width = self.vision.embed.in_features, self.vision.embed.out_features
        self.projector = Projector(features, width)
        self.projector.load(settings.init / "projector.safetensors")
        self.to(settings.device)

    def page(self, features: Tensor) -> Tensor:
        """Features (B, N, hidden) as they enter the sequence: (B, N + 1, width), newline last."""
        grid = self.projector(features)
        newline = self.reader.table.newline.to(grid).expand(len(grid), 1, -1)
        return torch.cat([grid, newline], dim=1)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        (pixels, slots, rows), _ = self.reader.draw(step)
        images = to_tensor(pixels, self.device)
        with self.autocast():
            features = self.vision.features(images)
            page = self.page(features)
        answering, numbers = self.reader.answer(page, rows)
        told = torch.from_numpy(slots).to(self.device)
        reading, read = self.vision.supervise(features, images, told)
        numbers |= {"answering": answering.item(), "read": read["right"], "size": read["size"]}
        return answering + 0.5 * reading, numbers

    def measure(self) -> dict[str, float]:
        """Answers through the tower, and characters that it reads, on held-out pages."""
        scores = self.reader.answers(lambda _, images: self.page(self.vision.features(images)))
        return scores | {f"read_{name}": share for name, share in self.vision.measure().items()}


def train_pair(settings: PairSettings) -> None:
    """Train, resuming where a run stopped; write both backbones and the projector in bf16."""
    trainee = ReadingPair(settings)
    run_loop(
        trainee,
        Optimisers(trainee, matrix_rate=7e-4, other_rate=5e-4),
        settings.run,
        steps=settings.steps,
        warmup=100,
        cooldown=0.85,
        measure_every=500,
        save_every=250,
    )
    save_bf16(trainee.reader, "language", settings.out / "language")
    save_tokenizer(settings.out / "language")
    save_bf16(trainee.vision, "tower", settings.out / "vision")
    trainee.projector.save(settings.out / "projector.safetensors", trainee.reader.table.newline)
