"""The decoders that are compared, on random weights, and what each is asked to do.

The baseline is the stock transformers class itself. A ProxyV arm holds the same weights (the same
memory, where nothing trains) plus its own modules. Only the decoder runs: rows enter as
embeddings, and neither the vision tower nor the language-model head is part of it, since both
cost the same in every arm. What a method computes at the tower is therefore not timed; that of
one inside the decoder is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.cache_utils import Cache, DynamicCache

from proxyv.config import ProxyVConfig
from proxyv.model.cache import GrowingCache
from proxyv.model.crops import ImageGrid
from proxyv.model.families import build_language_model
from proxyv.model.flops import RowTokens
from proxyv.model.image_spans import ImageSpan
from proxyv.model.layout_builder import build_layout
from proxyv.model.streams import DecoderOptions
from proxyv.profiling.shapes import arm_name, further_arms, with_start

__all__ = ["Arm", "Inputs", "build_arms", "make_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Rows for the arms.

    Attributes:
        row: what each row of the batch holds.
        rows: (B, S, D) embeddings, half of the text before the image.
        step: (B, 1, D) one more, for a decoding step.
        spans: where the image is, for each row of the batch.
    """

    row: RowTokens
    rows: Tensor
    step: Tensor
    spans: list[list[ImageSpan]]


@dataclass
class Arm:
    """One decoder.

    Attributes:
        name: in tables.
        config: what was built; ``start_layer`` None is the baseline.
        model: the decoder.
    """

    name: str
    config: ProxyVConfig
    model: Any

    def inference(self) -> None:
        """Prepare for inference: guided updates are folded."""
        self.model.eval()
        if hasattr(self.model, "fuse"):  # the baseline is a stock model
            self.model.fuse()

    def training(self, checkpointing: bool = False) -> None:
        """Prepare for training: folding is undone."""
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def compile(self, backend: str = "inductor") -> None:
        """Compile every layer, each at its first call; graphs do not depend on lengths.

        All layers are one piece of code to torch, which gives up after eight graphs of it and
        leaves the rest uncompiled without a word: the limit is raised, and reaching it an error.
        """
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1 << 12
        dynamo.fail_on_recompile_limit_hit = True
        for layer in self.model.layers:
            layer.compile(dynamic=True, backend=backend)

    def forget_gradients(self) -> None:
        """Free all gradients."""
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self, inputs: Inputs, stock: bool = False) -> Cache:
        """Read all rows; returns the cache, a stock one or one that grows in place."""
        cache = (DynamicCache if stock else GrowingCache)(config=self.model.config)
        self.read(inputs, past_key_values=cache, use_cache=True)
        return cache

    @torch.no_grad()
    def decode(self, inputs: Inputs, cache: Cache, steps: int = 1) -> None:
        """Read so many more tokens, one after another."""
        for _ in range(steps):
            self.model(inputs_embeds=inputs.step, past_key_values=cache, use_cache=True)

    def answer(self, inputs: Inputs, tokens: int) -> None:
        """Prefill and decode so many tokens."""
        self.decode(inputs, self.prefill(inputs), tokens)

    def train_step(self, inputs: Inputs) -> None:
        """Forward and backward, gradients for all weights and for the rows; no optimiser."""
        rows = inputs.rows.detach().requires_grad_()
        hidden = self.read(inputs, rows=rows, use_cache=False)
        answer = max(1, inputs.row.text // 2)
        hidden[:, -answer:].float().square().mean().backward()

    @property
    def _needs_layout(self) -> bool:
        """ProxyV layers and methods inside the decoder ask what the rows are; empty rows, too."""
        method = self.config.reduction_method
        inside = method is not None and (method.stage == "decoder" or self.config.image_decides)
        return inside or self.config.start_layer is not None

    def read(self, inputs: Inputs, rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, S, D) hidden states of the inputs' rows, or of others in their place.

        The layout is made anew, since it is part of what ProxyV costs. Other arguments go to the
        decoder.
        """
        rows = inputs.rows if rows is None else rows
        if inputs.row.crops and self._needs_layout:
            real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
            kwargs["layout"] = build_layout(
                inputs.spans,
                real,
                self.config.num_proxies,
                released=self.config.layout == "released",
                block=self.config.proxy_block,
            )
        return self.model(inputs_embeds=rows, **kwargs).last_hidden_state


def build_arms(
    config: ProxyVConfig,
    starts: list[int],
    attention: str,
    dtype: torch.dtype,
    device: str,
    skips: Sequence[str] = (),
    reductions: Sequence[Mapping[str, Any]] = (),
) -> list[Arm]:
    """The stock baseline first, then ProxyV from each layer, layers that skip, and reductions.

    Args:
        config: the shape.
        starts: start layers.
        attention: attention function of all arms.
        dtype: of all weights.
        device: where they lie.
        skips: what vision tokens skip in further arms, "atn" or "atn_ffn".
        reductions: token-reduction methods of further arms, alone and with ProxyV layers.

    Raises:
        ValueError: a start layer that the model does not have, or a method that does not go with
            the other options.
    """
    configs = [with_start(config, start) for start in starts]
    configs += further_arms(config, starts, skips, reductions)
    names = [arm_name(chosen, learned=True) for chosen in configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two arms would be called {name}: measure them one by one")
    text = with_start(config, None).text_config
    text.dtype = dtype
    text._attn_implementation = attention
    with torch.device(device):
        stock = AutoModel.from_config(text, dtype=dtype, attn_implementation=attention)
        arms = [Arm("baseline", with_start(config, None), stock)]
        for name, chosen in zip(names, configs, strict=True):
            model = build_language_model(text, DecoderOptions.of(chosen))
            model.set_attn_implementation(attention)
            model.load_state_dict(stock.state_dict(), strict=False, assign=True)
            arms.append(Arm(name, chosen, model))
    return arms


def make_inputs(config: ProxyVConfig, row: RowTokens, batch: int, like: Tensor) -> Inputs:
    """Random rows of the type, and on the device, of ``like``."""
    generator = torch.Generator().manual_seed(0)
    length = row.crops * config.rows_per_crop + row.text
    width = config.text_config.hidden_size

    def draw(rows: int) -> Tensor:
        return torch.randn(batch, rows, width, generator=generator).mul_(0.02).to(like)

    kept = (row.kept,) * row.crops if row.kept is not None and config.image_decides else None
    grid = ImageGrid(row.crops, config.crop_side, row.crops * config.rows_per_crop, kept)
    image = [ImageSpan(row.text // 2, grid)] if row.crops else []
    return Inputs(row, draw(length), draw(1), [image] * batch)
