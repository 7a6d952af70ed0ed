"""A random model of a few thousand parameters, saved with its processor and tokenizer."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv import ProxyVConfig, ProxyVForConditionalGeneration, ProxyVProcessor
from proxyv.data.templates import TEMPLATES, mark_template

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>", "<|assistant|>")
CROP_PX, PATCH_PX = 32, 8


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    mark_template(fast, TEMPLATES["tiny"])
    return fast


def save_small_model(
    folder: Path,
    *,
    start_layer: int | None = 1,
    image_aspect_ratio: str = "pad",
    **options: object,
) -> Path:
    """Write a seeded random model to ``folder`` and return it; options are the configuration's."""
    tokenizer = character_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=CROP_PX,
        patch_size=PATCH_PX,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    pinpoints = [(CROP_PX, 2 * CROP_PX), (2 * CROP_PX, CROP_PX), (2 * CROP_PX, 2 * CROP_PX)]
    config = ProxyVConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        start_layer=start_layer,
        **options,
    )
    torch.manual_seed(0)
    model = ProxyVForConditionalGeneration(config)
    with torch.no_grad():  # wider than a fresh model, so that answers depend on the input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": CROP_PX},
        crop_size={"height": CROP_PX, "width": CROP_PX},
        image_grid_pinpoints=pinpoints,
    )
    processor = ProxyVProcessor(
        images,
        tokenizer,
        patch_size=PATCH_PX,
        image_token="<image>",
        image_aspect_ratio=image_aspect_ratio,
    )
    processor.save_pretrained(folder)
    return folder
