"""Stage 0, language: pretrain the tiny Llama on pages given as characters instead of pixels.

A page becomes its patches: for each, the characters that lie in it and the colours of its cells
are summed into one embedding by a table that is thrown away afterwards. On these pages the model
learns to copy a page and to answer questions about it, so that the two stages only have to connect
the tower. No picture is involved, and no page of the data sets.

    python -m proxyv.train.stage0 language --run runs/language --steps 6000
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxyv.data.templates import IGNORE_INDEX, IMAGE_MARK, Rendered, Renderer, Turn
from proxyv.synthetic.page import Page
from proxyv.synthetic.world import READ_PROMPT, Mix, prompt_suffix
from proxyv.train.stage0.loop import Optimisers, Trainee, run_loop, save_bf16
from proxyv.train.stage0.pages import PageRing, held_out
from proxyv.train.stage0.targets import (
    ALPHABET,
    CELLS,
    SLOTS,
    colour_cells,
    patch_targets,
    to_tensor,
)
from proxyv.train.stage0.tokenizer import build_tokenizer, save_tokenizer

__all__ = ["LanguageSettings", "language_config", "train_language"]

READ_SHARE = 0.3  # of the pages are copied in whole, the others asked about
PAGE_TOKENS = 145  # 12 x 12 patches and the newline


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
class LanguageSettings:
    """How the language model is pretrained."""

    run: Path
    out: Path
    steps: int = 6000
    batch: int = 12
    seed: int = 12
    ring: int = 3000
    renew: int = 6
    workers: int = 1
    turns: int = 6
    mix: Mix = field(default_factory=lambda: Mix(text=0.2, documents=0.5, charts=0.3))


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
        width = config.hidden_size
        self.slots = nn.Embedding(SLOTS * (len(ALPHABET) + 1), width)
        nn.init.normal_(self.slots.weight, std=0.05)
        self.cells = nn.Linear(3 * CELLS * CELLS, width, bias=False)
        nn.init.normal_(self.cells.weight, std=0.02)
        self.places = nn.Embedding(PAGE_TOKENS - 1, width)  # as a tower's features have them
        nn.init.normal_(self.places.weight, std=0.02)
        self.newline = nn.Parameter(torch.randn(width) * 0.02)
        self.ring = PageRing(settings.seed, settings.ring, settings.mix, 168, settings.workers)
        self.held = {
            kind: list(held_out(64, 900 + settings.seed, "test", mix, 168))
            for kind, mix in {"documents": Mix(0, 1, 0), "charts": Mix(0, 0, 1)}.items()
        }

    def _conversation(self, page: Page, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Turns about one page: a transcription now and then, else some of its questions."""
        if not page.questions or rng.random() < READ_SHARE:
            return [(READ_PROMPT, page.caption[:200])]
        suffix = prompt_suffix(page)
        order = rng.permutation(len(page.questions))[: self.settings.turns]
        picked = [page.questions[int(index)] for index in order]
        return [(question.text + suffix, question.answers[0]) for question in picked]

    def _tokens(self, turns: list[tuple[str, str]]) -> Rendered:
        """Ids and labels of a conversation about one page, image tokens included."""
        messages = [
            Turn(role, text)
            for index, (question, answer) in enumerate(turns)
            for role, text in (
                ("user", question if index else f"{IMAGE_MARK}\n{question}"),
                ("assistant", answer),
            )
        ]
        return self.renderer.render(messages, [PAGE_TOKENS])

    def embed_page(self, slots: Tensor, images: Tensor) -> Tensor:
        """(B, N, SLOTS) classes and (B, 3, H, W) pixels to (B, N + 1, width), newline last."""
        B = len(slots)
        offsets = torch.arange(SLOTS) * (len(ALPHABET) + 1)
        written = self.slots(slots + offsets) * (slots > 0).unsqueeze(-1)
        colours = colour_cells(images, 14)
        # Relative to the paper: else its constant colour drowns what is written on it.
        colours = colours - colours.median(dim=1, keepdim=True).values
        grid = written.sum(2) + self.cells(colours) + self.places.weight
        return torch.cat([grid, self.newline.expand(B, 1, -1)], dim=1)

    def logits(self, slots: Tensor, images: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, S, V) of conversations whose image tokens are replaced by their page."""
        embeds = self.language.get_input_embeddings()(ids)
        is_page = (ids == self.renderer.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_page, self.embed_page(slots, images).to(embeds.dtype))
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

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        if not self.ring.pages:
            self.ring.drawn = step * settings.renew  # a resumed run goes on to new pages
            self.ring.fill()
        self.ring.renew(settings.renew)
        rng = np.random.default_rng((settings.seed, step))
        pixels, slots, pages = self.ring.batch(rng, settings.batch, 14, shift_px=7)
        ids, labels = self._pad([self._tokens(self._conversation(p, rng)) for p in pages])
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.logits(torch.from_numpy(slots), to_tensor(pixels), ids)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX
        )
        said = labels != IGNORE_INDEX
        right = (logits.argmax(-1) == labels)[said].float().mean().item()
        return loss, {"right": right}

    def measure(self) -> dict[str, float]:
        """Teacher-forced share of answer characters and of whole answers on held-out pages."""
        scores = {}
        for kind, pages in self.held.items():
            hits = total = whole = answers = 0
            for image, glyphs, page in pages:
                turns = [(q.text + prompt_suffix(page), q.answers[0]) for q in page.questions[:4]]
                slots = torch.from_numpy(patch_targets(glyphs, (12, 12), 14))[None]
                ids, labels = self._pad([self._tokens(turns)])
                logits = self.logits(slots, to_tensor(image[None]), ids)
                said = labels[0] != IGNORE_INDEX
                good = (logits.argmax(-1) == labels)[0]
                hits, total = hits + int(good[said].sum()), total + int(said.sum())
                ends = torch.nonzero(labels[0] == 2).flatten().tolist()
                start = 0
                for end in ends:
                    span = said[start : end + 1]
                    whole += int(good[start : end + 1][span].all())
                    answers, start = answers + 1, end + 1
            scores[f"{kind}_characters"] = hits / total
            scores[f"{kind}_answers"] = whole / answers
        return scores


def train_language(settings: LanguageSettings) -> None:
    """Train, resuming where a run stopped; write model (bf16) and tokenizer to ``settings.out``."""
    trainee = GridReader(settings)
    run_loop(
        trainee,
        Optimisers(trainee, matrix_rate=2e-3, other_rate=2e-3),
        settings.run,
        steps=settings.steps,
        warmup=200,
        cooldown=0.35,
        measure_every=250,
        save_every=250,
        report=lambda line: print(line, flush=True),
    )
    save_bf16(trainee.language, settings.out)
    save_tokenizer(settings.out)
