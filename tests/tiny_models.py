"""Random models of a few thousand parameters, and batches for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from proxyv import ProxyVConfig, ProxyVForConditionalGeneration
from proxyv.model.checkpoints import check_variant, from_released, load_exactly

IMAGE_TOKEN = 59


def tiny_config(**overrides: Any) -> ProxyVConfig:
    """A configuration of about 60,000 parameters: 4 layers, crops of 4 x 4 patches."""
    text = {
        "model_type": "llama",
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **overrides.pop("text", {}),
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        **overrides.pop("vision", {}),
    }
    options = {
        "start_layer": 2,
        "side_reduction": 2,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    }
    return ProxyVConfig(vision_config=vision, text_config=text, **{**options, **overrides})


def tiny_model(
    seed: int = 0, attention: str = "sdpa", spread: float = 0.3, **overrides: Any
) -> ProxyVForConditionalGeneration:
    """A random model whose weights are wide enough that attention matters."""
    torch.manual_seed(seed)
    model = ProxyVForConditionalGeneration(tiny_config(**overrides)).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
    return model


def load_released(model: ProxyVForConditionalGeneration, state: Mapping[str, Tensor]) -> None:
    """Load a state dict with the released names, all of it or nothing."""
    check_variant(state, model.config)
    load_exactly(model, from_released(state, model.config.start_layer), model.state_dict())


def sample(
    parts: list[int | str],
    config: ProxyVConfig,
    generator: torch.Generator,
) -> tuple[Tensor, list[Tensor]]:
    """One sequence without padding.

    Args:
        parts: "text" lengths as integers and images as strings of their crops: ``[3, "2", 4]``.
        config: of the model.
        generator: source of ids and pixels.

    Returns:
        ids (S,) and the pixels (C, 3, height, width) of each image.
    """
    ids, images = [], []
    px = config.vision_config.image_size
    for part in parts:
        if isinstance(part, str):
            crops = int(part)
            ids.append(torch.full((crops * config.rows_per_crop,), IMAGE_TOKEN))
            images.append(torch.randn(crops, 3, px, px, generator=generator))
        else:
            ids.append(torch.randint(3, IMAGE_TOKEN - 1, (part,), generator=generator))
    return torch.cat(ids), images


def collate(samples: list[tuple[Tensor, list[Tensor]]], side: str = "right") -> dict[str, Tensor]:
    """Pad samples to one batch of model inputs."""
    length = max(len(ids) for ids, _ in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
    }
    for row, (ids, _) in enumerate(samples):
        where = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        batch["input_ids"][row, where] = ids
        batch["attention_mask"][row, where] = 1
    images = [image for _, pictures in samples for image in pictures]
    if images:
        most = max(len(image) for image in images)
        pixels = torch.zeros(len(images), most, *images[0].shape[1:])
        for target, image in zip(pixels, images, strict=True):
            target[: len(image)] = image
        batch["pixel_values"] = pixels
        batch["num_crops"] = torch.tensor([len(image) for image in images])
    return batch
