"""What a prompt costs a loaded model, whatever its method: counted and measured, not derived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from proxyv.profiling.measure import Timing, peak_memory, time_interleaved

__all__ = ["Cost", "make_prompt", "measure_cost", "prefill"]


@dataclass(frozen=True)
class Cost:
    """Of reading one prompt.

    Attributes:
        decoder_flops: of the language model without its head, with attention as S x S.
        flops: of the whole model, vision tower and head included.
        prefill: time of the whole model.
        peak_bytes: most memory above the weights.
    """

    decoder_flops: int
    flops: int
    prefill: Timing
    peak_bytes: int


def make_prompt(model: Any, crops: int, text: int) -> dict[str, Tensor]:
    """Inputs with one image of random pixels, half of the text before it.

    Raises:
        ValueError: a packing whose tokens do not follow from the crops.
    """
    config = model.config
    if config.packing != "crops":
        raise ValueError(
            f"packing={config.packing!r}: costs are measured with packing 'crops' only"
        )
    generator = torch.Generator().manual_seed(0)
    px, token = config.vision_config.image_size, config.image_token_index
    vocabulary = config.text_config.vocab_size
    words = torch.randint(1, vocabulary, (text,), generator=generator)
    words = torch.where(words == token, 1, words)
    image = torch.full((crops * config.rows_per_crop,), token)
    ids = torch.cat([words[: text // 2], image, words[text // 2 :]])[None]
    pixels = torch.randn(1, crops, 3, px, px, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
        "num_crops": torch.tensor([crops]),
    }


def measure_cost(model: Any, crops: int, text: int, repeats: int) -> Cost:
    """Measure a model in evaluation mode; guided updates are folded first, and stay so.

    Args:
        model: a ``ProxyVForConditionalGeneration``.
        crops: of the image.
        text: tokens that are not of the image.
        repeats: timed rounds, after one that warms up.
    """
    model.fuse()
    work = partial(prefill, model, make_prompt(model, crops, text))
    with _eager(model), FlopCounterMode(display=False) as counter:
        work()
    by_module = counter.get_flop_counts()
    decoder = next(c for name, c in by_module.items() if name.endswith(".model.language_model"))
    return Cost(
        decoder_flops=sum(decoder.values()),
        flops=counter.get_total_flops(),
        prefill=time_interleaved({"prefill": work}, model.device, repeats)["prefill"],
        peak_bytes=peak_memory(work, model.device),
    )


@torch.inference_mode()
def prefill(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Logits (B, 1, V) of the last row of a prompt, which fills a cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1).logits


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Eager attention, which is the one that torch counts on every device."""
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(name)
