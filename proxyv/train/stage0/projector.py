"""Stage 0, projector: from the tower's features to the page embedding, by plain regression.

Real LLaVA starts stage 1 from a random projector and has 558,000 captions to find a good one; the
quickstart has 6,000. With the tower and the page table of the language model both at hand, the
projector can be fitted directly, in two minutes; stage 1 then starts from it (docs/log.md).

    python -m proxyv.train.stage0 projector --run runs/projector
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proxyv.model.stage1 import read_stage1, write_stage1
from proxyv.synthetic.world import Mix
from proxyv.train.stage0.loop import Optimisers, PartSettings, Trainee, load_bf16, run_loop
from proxyv.train.stage0.pages import PageRing, held_out
from proxyv.train.stage0.targets import GRID, PAGE_HW, PATCH_PX, patch_targets, to_tensor
from proxyv.train.stage0.tower import ReadingTower, TowerSettings

__all__ = ["Projector", "ProjectorSettings", "train_projector"]

_PROJECTOR = "model.multi_modal_projector."


class Projector(nn.Module):
    """LLaVA's projector, an MLP with one hidden layer as wide as the language model."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, tower width) to (B, N, width of the language model)."""
        return self.linear_2(F.gelu(self.linear_1(features)))

    def load(self, path: Path) -> None:
        """Take the weights of a stage-1 file; see :func:`~proxyv.model.stage1.read_stage1`."""
        state = read_stage1(path, None)
        self.load_state_dict(
            {n.removeprefix(_PROJECTOR): t for n, t in state.items() if n.startswith(_PROJECTOR)}
        )

    def save(self, path: Path, newline: Tensor) -> None:
        """Write a stage-1 file in bfloat16; the newline is the language model's."""
        state = {f"{_PROJECTOR}{name}": tensor for name, tensor in self.state_dict().items()}
        state["model.image_newline"] = newline
        write_stage1({n: t.detach().to(torch.bfloat16) for n, t in state.items()}, path, None)


@dataclass(frozen=True)
class ProjectorSettings(PartSettings):
    """How the projector is fitted.

    Attributes:
        language: folder of the language model.
        vision: folder of the tower.
        mix: kinds of page.
    """

    steps: int = 420
    seed: int = 29
    ring: int = 1200
    renew: int = 8
    held: int = 48
    language: Path = Path("data/tiny/language")
    vision: Path = Path("data/tiny/vision")
    mix: Mix = field(default_factory=lambda: Mix(text=0.1, documents=0.45, charts=0.45))


class PageProjector(Trainee):
    """The projector beside the tower and the page table that it is fitted between."""

    def __init__(self, settings: ProjectorSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.settings = settings
        given = TowerSettings(
            settings.run, settings.out, language=settings.language, held=0, workers=0
        )
        tower = ReadingTower(given)
        load_bf16(tower, "tower", settings.vision)
        self.frozen = (tower.requires_grad_(False).eval(),)  # in a tuple it is no part of this
        width = len(tower.target[0].newline)
        self.projector = Projector(tower.tower.config.hidden_size, width)
        self.ring = PageRing(settings.seed, settings.ring, settings.mix, PAGE_HW, settings.workers)

    def unexplained(self, images: Tensor, slots: Tensor) -> Tensor:
        """Share of the page embedding's variance that the projector misses."""
        tower = self.frozen[0]
        with torch.no_grad(), self.autocast():
            features = tower.features(images)
        wanted = tower.target[0](slots, images)
        return F.mse_loss(self.projector(features.float()), wanted) / wanted.var(dim=(0, 1)).mean()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        self.ring.advance(step, settings.renew)
        rng = np.random.default_rng((settings.seed, step))
        pixels, slots, _ = self.ring.batch(rng, settings.batch, PATCH_PX, shift_px=5)
        return self.unexplained(to_tensor(pixels), torch.from_numpy(slots)), {}

    def measure(self) -> dict[str, float]:
        """Unexplained share on test pages, which have other typefaces and looks."""
        scores = {}
        for kind, mix in (("documents", Mix(0, 1, 0)), ("charts", Mix(0, 0, 1))):
            pages = list(
                held_out(self.settings.held, 900 + self.settings.seed, "test", mix, PAGE_HW)
            )
            slots = np.stack(
                [patch_targets(glyphs, (GRID, GRID), PATCH_PX) for _, glyphs, _ in pages]
            )
            images = to_tensor(np.stack([image for image, _, _ in pages]))
            scores[kind] = self.unexplained(images, torch.from_numpy(slots)).item()
        return scores


def train_projector(settings: ProjectorSettings) -> None:
    """Fit, resuming where a run stopped, and write a stage-1 file to ``settings.out``."""
    trainee = PageProjector(settings)
    run_loop(
        trainee,
        Optimisers(trainee, matrix_rate=3e-3, other_rate=3e-3),
        settings.run,
        steps=settings.steps,
        warmup=20,
        cooldown=0.6,
        measure_every=settings.steps,
        save_every=100,
    )
    trainee.projector.save(settings.out, trainee.frozen[0].target[0].newline)
