"""Stage 0, language: pretrain the tiny Llama on pages given as characters instead of pixels.

A page becomes its patches: for each, the characters that lie in it and the colours of its cells
are summed into one embedding by a table that is thrown away afterwards. On these pages the model
learns to copy a page and to answer questions about it, so that the two stages only have to connect
the tower. No picture is involved, and no page of the data sets.

    python -m proxyv.train.stage0 language --run runs/language --steps 6000
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from proxyv.data.templates import IGNORE_INDEX, IMAGE_MARK, Rendered, Renderer, Turn
from proxyv.synthetic.page import Page
from proxyv.synthetic.world import READ_PROMPT, Mix, prompt_suffix
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
from proxyv.train.stage0.targets import PAGE_HW, PATCH_PX, patch_targets, to_tensor
from proxyv.train.stage0.tokenizer import build_tokenizer, save_tokenizer

__all__ = ["LanguageSettings", "language_config", "train_language"]

READ_SHARE = 0.25  # of the pages are copied in whole, the others asked about
STRIP_HW = (56, 168)
SORTED_BATCHES = 4

Batch = tuple[np.ndarray, np.ndarray, list[Rendered]]  # pixels, slots, conversations


def language_config(vocab_size: int) -> LlamaConfig:
    """The tiny language model: 5.3 M parameters, 8 layers, width 256."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@dataclass(frozen=True)
class Phase:
    """Part of a run: its pages, and how many of them make a batch.

    Attributes:
        steps: how long it lasts; the last phase lasts to the end.
        size_hw: height and width of its pages.
        batch: pages of a step.
        mix: kinds of page.
    """

    steps: int
    size_hw: tuple[int, int]
    batch: int
    mix: Mix


# Finding and copying come within minutes on pages of a few lines, and going from a name to what
# stands above it on words in rows and columns; on full pages alone either takes hours
# (docs/log.md).
CURRICULUM = (
    Phase(700, STRIP_HW, 24, Mix(text=0.25, documents=0.75, charts=0.0)),
    Phase(600, PAGE_HW, 16, Mix(0.0, 0.05, 0.0, 0.35, 0.6, chart_questions=(6, 10))),
    Phase(900, PAGE_HW, 12, Mix(0.02, 0.14, 0.2, 0.5, 0.14, chart_questions=(6, 10))),
    Phase(0, PAGE_HW, 12, Mix(0.03, 0.22, 0.55, 0.1, 0.1, chart_questions=(6, 10))),
)


@dataclass(frozen=True)
class LanguageSettings(PartSettings):
    """How the language model is pretrained.

    Attributes:
        batch: pages of a step in the last phase, the others in proportion.
        phases: the curriculum.
        init: an earlier language model to start from, in the last phase.
        turns: questions of a page at most.
        noise: deviation of what is added to a page.
        stretch: see ``warped``.
    """

    batch: int = CURRICULUM[-1].batch
    seed: int = 12
    ring: int = 3000
    renew: int = 4
    phases: tuple[Phase, ...] = CURRICULUM
    init: Path | None = None
    turns: int = 8
    noise: float = 0.04  # what a tower's features leave in doubt, beside embeddings of 0.15 RMS
    stretch: float = 0.0


class GridReader(Trainee):
    """The language model with the table of patch contents that is thrown away."""

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.tokenizer = build_tokenizer()
        self.renderer = Renderer(self.tokenizer, "tiny")
        config = language_config(len(self.tokenizer))
        self.language = LlamaForCausalLM(config)
        self.rows, self.columns = (side // PATCH_PX for side in PAGE_HW)
        self.table = PageTable(config.hidden_size, (self.rows, self.columns), PATCH_PX)
        self.to(settings.device)
        self.rings = [
            PageRing(settings.seed, settings.ring, phase.mix, phase.size_hw, settings.workers)
            for phase in settings.phases
        ]
        self._waiting: tuple[int, list[Batch]] = (0, [])  # of a phase
        self.held = {
            kind: list(held_out(settings.held, 900 + settings.seed, "test", mix, PAGE_HW))
            for kind, mix in {
                "documents": Mix(0, 1, 0),
                "charts": Mix(0, 0, 1),
                "small_charts": Mix(0, 0, 0, 1),
                "grids": Mix(0, 0, 0, 0, 1),
            }.items()
        }

    def _conversation(self, page: Page, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Turns about one page: a transcription now and then, else some of its questions."""
        if not page.questions or rng.random() < READ_SHARE:
            return [(READ_PROMPT, page.caption[:200])]
        suffix = prompt_suffix(page)
        order = rng.permutation(len(page.questions))[: self.settings.turns]
        picked = [page.questions[int(index)] for index in order]
        return [(question.text + suffix, question.answers[0]) for question in picked]

    def _tokens(self, turns: list[tuple[str, str]], patches: int) -> Rendered:
        """Ids and labels of a conversation about one page, image tokens included."""
        messages = []
        for index, (question, answer) in enumerate(turns):
            asked = question if index else f"{IMAGE_MARK}\n{question}"
            messages += [Turn("user", asked), Turn("assistant", answer)]
        return self.renderer.render(messages, [patches + 1])

    def embed_page(self, slots: Tensor, images: Tensor, first_row: int = 0) -> Tensor:
        """Pages as they enter the sequence: (B, N + 1, width), newline last."""
        grid = self.table(slots, images, first_row)
        newline = self.table.newline.to(grid).expand(len(grid), 1, -1)
        return torch.cat([grid, newline], dim=1)

    def logits(self, page: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, S, V) of conversations whose image tokens are replaced by their page."""
        embeds = self.language.get_input_embeddings()(ids)
        is_page = (ids == self.renderer.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_page, page.to(embeds.dtype))
        return self.language(inputs_embeds=embeds, use_cache=False).logits

    def _pad(self, rows: list[Rendered]) -> tuple[Tensor, Tensor]:
        """Stack rows to ids (B, S) and labels (B, S), row i the label of what follows token i."""
        longest = max(len(row.input_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), IGNORE_INDEX)
        for index, row in enumerate(rows):
            ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
            labels[index, : len(row.labels) - 1] = torch.tensor(row.labels[1:])
        return ids, labels

    def _phase(self, step: int) -> int:
        """Which phase a step is in."""
        ends = np.cumsum([phase.steps for phase in self.settings.phases[:-1]])
        return int(np.searchsorted(ends, step, side="right"))

    def _batch(self, index: int, rng: np.random.Generator) -> Batch:
        """Pages with a conversation each; drawn several batches at a time, to pad little."""
        ring, size = self.rings[index], self.settings.phases[index].batch
        phase, waiting = self._waiting
        if not waiting or phase != index:
            pixels, slots, pages = ring.batch(
                rng, size * SORTED_BATCHES, PATCH_PX, 7, self.settings.stretch
            )
            rows = [self._tokens(self._conversation(page, rng), slots.shape[1]) for page in pages]
            by_length = np.argsort([len(row.input_ids) for row in rows]).reshape(-1, size)
            waiting = [
                (pixels[part], slots[part], [rows[i] for i in part])
                for part in rng.permutation(by_length)
            ]
            self._waiting = index, waiting
        return waiting.pop()

    def draw(self, step: int) -> tuple[Batch, np.random.Generator]:
        """The step's pages with their conversations, and what is left of its randomness."""
        settings = self.settings
        index = self._phase(step)
        self.rings[index].advance(step, settings.renew)
        rng = np.random.default_rng((settings.seed, step))
        return self._batch(index, rng), rng

    def answer(self, page: Tensor, rows: list[Rendered]) -> tuple[Tensor, dict[str, float]]:
        """The loss of the answers in conversations about embedded pages (B, N + 1, width)."""
        ids, labels = (tensor.to(self.device) for tensor in self._pad(rows))
        with self.autocast():
            logits = self.logits(page, ids)
        said = labels != IGNORE_INDEX
        losses = F.cross_entropy(logits[said].float(), labels[said], reduction="none")
        weights = answer_weights(labels)[said]
        loss = (weights * losses).sum() / weights.sum()
        right = (logits.argmax(-1) == labels)[said].float().mean().item()
        return loss, {"right": right}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        (pixels, slots, rows), rng = self.draw(step)
        patches = slots.shape[1]
        first_row = int(rng.integers(self.rows - patches // self.columns + 1))
        with self.autocast():
            told = torch.from_numpy(slots).to(self.device)
            page = self.embed_page(told, to_tensor(pixels, self.device), first_row)
            page = page + self.settings.noise * torch.randn_like(page)
        return self.answer(page, rows)

    def measure(self) -> dict[str, float]:
        """Scores on held-out pages that are given as characters."""
        return self.answers(self.embed_page)

    def answers(self, embed: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        """Teacher-forced share of answer characters and of whole answers on held-out pages.

        Args:
            embed: makes of slots (1, N, SLOTS) and pixels (1, 3, H, W) a page (1, N + 1, width).
        """
        scores = {}
        for kind, pages in self.held.items():
            hits = total = whole = answers = 0
            for image, glyphs, page in pages:
                turns = [(q.text + prompt_suffix(page), q.answers[0]) for q in page.questions[:4]]
                slots = patch_targets(glyphs, (self.rows, self.columns), PATCH_PX)
                padded = self._pad([self._tokens(turns, len(slots))])
                ids, labels = (tensor.to(self.device) for tensor in padded)
                told = torch.from_numpy(slots[None]).to(self.device)
                logits = self.logits(embed(told, to_tensor(image[None], self.device)), ids)
                said = labels[0] != IGNORE_INDEX
                good = (logits.argmax(-1) == labels)[0]
                hits, total = hits + int(good[said].sum()), total + int(said.sum())
                ends = torch.nonzero(labels[0] == self.renderer.end_token_id).flatten().tolist()
                start = 0
                for end in ends:
                    span = said[start : end + 1]
                    whole += int(good[start : end + 1][span].all())
                    answers, start = answers + 1, end + 1
            scores[f"{kind}_characters"] = hits / total
            scores[f"{kind}_answers"] = whole / answers
        return scores


def answer_weights(labels: Tensor) -> Tensor:
    """Weight of each supervised token, (B, S): 1 / sqrt(tokens of its answer).

    Else a page copied in whole would count as much as fifty answers of one word.
    """
    weights = torch.zeros(labels.shape)
    for row, said in enumerate((labels != IGNORE_INDEX).cpu().numpy()):
        edges = np.flatnonzero(np.diff(said.astype(np.int8), prepend=0, append=0))
        for start, stop in edges.reshape(-1, 2):
            weights[row, start:stop] = (stop - start) ** -0.5
    return weights.to(labels.device)


def scaled(phases: tuple[Phase, ...], batch: int) -> tuple[Phase, ...]:
    """The same phases with ``batch`` pages a step in the last, the others in proportion."""
    share = batch / phases[-1].batch
    return tuple(replace(phase, batch=max(1, round(share * phase.batch))) for phase in phases)


def train_language(settings: LanguageSettings) -> None:
    """Train, resuming where a run stopped; write model (bf16) and tokenizer to ``settings.out``."""
    if settings.init:
        settings = replace(settings, phases=settings.phases[-1:])  # it knows how to find and copy
    settings = replace(settings, phases=scaled(settings.phases, settings.batch))
    trainee = GridReader(settings)
    if settings.init:
        load_bf16(trainee, "language", settings.init)
        trainee.table.requires_grad_(False)  # the tower learned to predict it as it is
    run_loop(
        trainee,
        Optimisers(trainee, matrix_rate=2e-3, other_rate=2e-3),
        settings.run,
        steps=settings.steps,
        warmup=200,
        # What an earlier run has learned is at its best again only late in the fall.
        cooldown=0.75 if settings.init else 0.35,
        measure_every=250,
        save_every=250,
    )
    save_bf16(trainee, "language", settings.out)
    save_tokenizer(settings.out)
