"""What generation has to know about images: they come once, beams share them, none is generated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from proxyv.model.crops import image_grids
from proxyv.model.layout import find_images

__all__ = ["IMAGE_INPUTS", "ImageGenerationMixin"]

IMAGE_INPUTS = ("pixel_values", "num_crops", "image_sizes", "pool_sizes")


class ImageGenerationMixin:
    """Generation with images; put it before the stock class.

    The class it is mixed into has ``model`` (a ``ProxyVModel``), ``config`` and ``device``.
    """

    config: Any
    model: Any
    device: torch.device

    def generate(
        self, *args: Any, logits_processor: LogitsProcessorList | None = None, **kwargs: Any
    ) -> Any:
        """Generate as any transformers model does; the image token is never generated."""
        processors = LogitsProcessorList(logits_processor or [])
        token = self.config.image_token_index
        if 0 <= token < self.config.text_config.vocab_size:
            processors.append(SuppressTokensLogitsProcessor([token], device=str(self.device)))
        parent: Any = super()
        return parent.generate(*args, logits_processor=processors, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand images on to the first step only; later steps find them in the cache."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        elif inputs.get("pixel_values") is not None:
            inputs["attention_mask"] = kwargs.get("attention_mask")  # a static cache made it 4-D
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat the inputs for beams; the images of a row are repeated together."""
        images = {name: model_kwargs.pop(name, None) for name in IMAGE_INPUTS}
        if expand_size > 1 and images["pixel_values"] is not None:
            order = self._images_of_beams(expand_size, input_ids, images, model_kwargs)
            images = {name: None if x is None else x[order] for name, x in images.items()}
        parent: Any = super()
        input_ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        model_kwargs.update({name: x for name, x in images.items() if x is not None})
        return input_ids, model_kwargs

    def _images_of_beams(
        self,
        expand_size: int,
        input_ids: Tensor | None,
        images: dict[str, Any],
        model_kwargs: dict[str, Any],
    ) -> Tensor:
        """Image of each image slot after every row was repeated ``expand_size`` times."""
        mask = self.model.image_mask(input_ids, model_kwargs.get("inputs_embeds"))
        pixel_values = images["pixel_values"]
        assert pixel_values is not None
        grids = image_grids(self.config, **images)
        order: list[int] = []
        first = 0
        for row in find_images(mask, grids):
            order += list(range(first, first + len(row))) * expand_size
            first += len(row)
        return torch.tensor(order, device=pixel_values.device)
