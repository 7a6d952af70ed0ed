"""What generation has to know about images: they come once, beams share them, none is generated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)
from transformers.cache_utils import DynamicCache

from proxyv.model.cache import GrowingCache
from proxyv.model.crops import image_grids
from proxyv.model.image_spans import find_images
from proxyv.model.vision import IMAGE_INPUTS
from proxyv.model.window import past_length
from proxyv.reduction.rows import last_rows
from proxyv.reduction.stages import rows_read

__all__ = ["ImageGenerationMixin"]


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
        prompt = _prompt(args, kwargs)
        if self.model.language_model.options.reduction is not None and prompt is not None:
            shape, mask = prompt.shape[:2], kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(shape, dtype=torch.bool, device=prompt.device)
            if mask.shape == shape:
                kwargs.setdefault("judges", last_rows(mask.bool()))
        parent: Any = super()
        return parent.generate(*args, logits_processor=processors, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand images on to the first step only; later steps find them in the cache.

        ``inputs_embeds`` stands in the signature because ``generate`` looks for it there.
        """
        parent: Any = super()
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        kwargs["next_sequence_length"] = _unread(prompt, is_first_iteration, kwargs)
        inputs = parent.prepare_inputs_for_generation(
            input_ids,
            *args,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*IMAGE_INPUTS, "judges"):
                inputs.pop(name, None)
        elif inputs.get("pixel_values") is not None:
            inputs["attention_mask"] = kwargs.get("attention_mask")  # a static cache made it 4-D
            if inputs.get("judges") is not None:  # without a cache, the answer is read with it
                rows = inputs.get("inputs_embeds")
                rows = inputs["input_ids"] if rows is None else rows
                added = rows.shape[1] - inputs["judges"].shape[1]
                inputs["judges"] = torch.nn.functional.pad(inputs["judges"], (0, added))
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Make the cache, which grows in place where the stock one would be copied each step."""
        given = model_kwargs.get("past_key_values")
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        made = model_kwargs.get("past_key_values")
        stock = type(made) is DynamicCache and not made.offloading
        if given is None and stock and not generation_config.is_assistant:
            model_kwargs["past_key_values"] = GrowingCache(
                config=self.config.get_text_config(decoder=True)
            )

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
        """Image of each image slot after every row was repeated ``expand_size`` times.

        Images are those of the rows that are new: earlier ones are in the cache.
        """
        embeds = model_kwargs.get("inputs_embeds")  # ``input_ids`` is empty beside them
        mask = self.model.image_mask(input_ids if embeds is None else None, embeds)
        cache = model_kwargs.get("past_key_values")
        read = rows_read(cache)  # of a reduced prompt the cache holds fewer
        mask = mask[:, past_length(cache) if read is None else read :]
        pixel_values = images["pixel_values"]
        assert pixel_values is not None
        grids = image_grids(self.config, **images)
        order: list[int] = []
        first = 0
        for row in find_images(mask, grids):
            order += list(range(first, first + len(row))) * expand_size
            first += len(row)
        return torch.tensor(order, device=pixel_values.device)


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What ``generate`` was given to read, (B, S) or (B, S, D), under any of its names."""
    given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
    return next((prompt for prompt in given if isinstance(prompt, Tensor)), None)


def _unread(prompt: Tensor, first: bool | None, kwargs: dict[str, Any]) -> int | None:
    """How many of the prompt's tokens are new.

    A prompt whose crops held empty rows takes fewer rows of the cache than tokens of the input.
    """
    length = kwargs.get("next_sequence_length")
    read = rows_read(kwargs.get("past_key_values"))
    return length if length is None or read is None or not first else prompt.shape[1] - read
