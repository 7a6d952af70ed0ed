"""What a scanner or a phone does to a page: a little skew, blur, noise, uneven paper, JPEG."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from proxyv.synthetic.page import Page

__all__ = ["degrade"]

MAX_SKEW_DEGREES = 2.0


def degrade(page: Page, rng: np.random.Generator, strength: float = 1.0) -> Page:
    """Return the page as a camera might see it; glyph positions follow the skew.

    Args:
        page: a clean page.
        rng: source of randomness.
        strength: 0 leaves the page as it is, 1 is the small world's usual wear.

    Raises:
        ValueError: ``strength`` outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength {strength} is not in [0, 1]; 0 is clean, 1 the usual wear")
    if strength == 0.0:
        return page
    image, glyphs = page.image, page.glyphs
    if rng.random() < 0.5:
        degrees = float(rng.uniform(-MAX_SKEW_DEGREES, MAX_SKEW_DEGREES)) * strength
        paper = tuple(int(v) for v in np.median(np.asarray(image)[:2].reshape(-1, 3), axis=0))
        image = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=paper)
        # Pillow turns counter-clockwise about the middle of the picture; y points down.
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        mid_x, mid_y = image.width / 2, image.height / 2
        glyphs = [
            replace(
                glyph,
                x=mid_x + (glyph.x - mid_x) * cos + (glyph.y - mid_y) * sin,
                y=mid_y - (glyph.x - mid_x) * sin + (glyph.y - mid_y) * cos,
            )
            for glyph in glyphs
        ]
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.55)) * strength))
    if rng.random() < 0.6:
        pixels = np.asarray(image, dtype=np.float32)
        contrast = 1.0 - float(rng.uniform(0.0, 0.35)) * strength
        light = float(rng.uniform(-20, 20)) * strength
        slope = np.linspace(-1, 1, pixels.shape[1], dtype=np.float32)[None, :, None]
        pixels = (pixels - 128) * contrast + 128 + light
        pixels = pixels + slope * float(rng.uniform(-15, 15)) * strength
        grain = float(rng.uniform(0, 9)) * strength
        pixels = pixels + rng.standard_normal(pixels.shape[:2], dtype=np.float32)[..., None] * grain
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.25:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(60, 95)))
        image = Image.open(buffer).convert("RGB")
    return replace(page, image=image, glyphs=glyphs)
