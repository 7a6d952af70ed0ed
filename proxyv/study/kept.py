"""Which patches of an image a reduced model keeps, and a picture of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from proxyv.eval.answerer import Answerer, user_message
from proxyv.reduction.base import DecoderReduction, TowerReduction
from proxyv.reduction.tower import tower_states

__all__ = ["data_uri", "draw_kept", "kept_patches"]

MAX_WIDTH_PX = 900
GAP_PX = 6
DROPPED_SHARE = 0.2  # of a dropped patch's contrast that is left


@torch.inference_mode()
def kept_patches(answerer: Answerer, question: str, images: Sequence[Image.Image]) -> Tensor | None:
    """The patches of a question's first image that reach the end of the decoder as they are.

    Args:
        answerer: the reduced model.
        question: its prompt.
        images: its images.

    Returns:
        (C, s, s) bool, crops in order; None for a model that merges all of them, or drops none.
    """
    model = answerer.model
    side, method = model.config.side, model.config.reduction_method
    inputs = answerer.inputs([[user_message(question, len(images))]], [images])
    pixels = inputs["pixel_values"].to(model.device, model.dtype)
    crops = int(inputs["num_crops"][0])
    if isinstance(method, TowerReduction) and not method.keeps_grid:
        kept = _kept_in_tower(model.model, method, pixels[0, :crops])
    elif isinstance(method, DecoderReduction):
        given = {name: x.to(model.device) for name, x in inputs.items()}
        # Rows that were dropped come back as zeros.
        hidden = model.model(**{**given, "pixel_values": pixels}).last_hidden_state[0]
        is_image = given["input_ids"][0] == model.config.image_token_index
        rows = hidden[is_image][: crops * (side**2 + 1)].view(crops, side**2 + 1, -1)
        kept = rows[:, :-1].abs().sum(dim=-1) > 0
    else:
        return None
    return kept.view(crops, side, side).cpu()


def _kept_in_tower(model: Any, method: TowerReduction, pixels: Tensor) -> Tensor:
    """(C, 3, height, width) -> (C, s*s) True at patches that stay tokens of their own."""
    config = model.config
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    has_class = config.vision_feature_select_strategy == "default"
    layer = config.vision_feature_layer
    found = method.reduce(tower_states(model.vision_tower, states, method, layer, has_class))
    patches = found.valid & (found.origin >= 0)
    # What is no patch goes behind the last one, which is cut off.
    place = torch.where(patches, found.origin, config.side**2)
    kept = torch.zeros(len(pixels), config.side**2 + 1, dtype=torch.bool, device=pixels.device)
    return kept.scatter(1, place, True)[:, :-1]


def draw_kept(answerer: Answerer, image: Image.Image, kept: Tensor | None) -> Image.Image:
    """The crops as the model sees them, dropped patches pale: the thumbnail, then the tiles.

    Args:
        answerer: the reduced model.
        image: what was asked about.
        kept: (C, s, s) as ``kept_patches`` gives it; None draws all.
    """
    processor = answerer.processor
    pixels = processor.image_inputs([image])["pixel_values"][0].float()  # (C, 3, px, px)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    pixels = (pixels * std + mean).clamp(0, 1)
    cut = processor.crop_layout((image.height, image.width))
    px = pixels.shape[-1]
    if kept is not None:
        patch = px // kept.shape[-1]
        shown = kept.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)[:, None]
        shown = torch.nn.functional.pad(shown, (0, px - shown.shape[-1], 0, px - shown.shape[-2]))
        pixels = torch.where(shown, pixels, 1 - DROPPED_SHARE * (1 - pixels))
    tiles_high, tiles_wide = cut.grid_hw
    width = px + (GAP_PX + tiles_wide * px if tiles_wide else 0)
    canvas = Image.new("RGB", (width, px * max(1, tiles_high)), "white")
    for number, crop in enumerate(pixels):
        array = (255 * crop).round().byte().permute(1, 2, 0).numpy()
        down, across = divmod(number - 1, max(1, tiles_wide))
        place = (0, 0) if number == 0 else (px + GAP_PX + across * px, down * px)
        canvas.paste(Image.fromarray(array), place)
    canvas.thumbnail((MAX_WIDTH_PX, MAX_WIDTH_PX))
    return canvas


def data_uri(image: Image.Image) -> str:
    """The picture as a text that a page can hold."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
