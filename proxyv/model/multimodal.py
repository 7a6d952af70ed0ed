"""The model without its head: vision tower, projector, newline token, ProxyV language model.

A subclass of transformers' LLaVA-NeXT; what differs is how images are packed (crops one after
another, one newline after each, nothing unpadded, unless ``packing`` asks for the stock way) and
which language model is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    LlavaNextModelOutputWithPast,
    LlavaNextMultiModalProjector,
)
from transformers.utils import can_return_tuple

from proxyv.config import ProxyVConfig
from proxyv.model.crops import ImageGrid
from proxyv.model.families import build_language_model
from proxyv.model.image_spans import find_images
from proxyv.model.layout import SequenceLayout
from proxyv.model.layout_builder import build_layout
from proxyv.model.streams import DecoderOptions
from proxyv.model.vision import FEATURE_OPTIONS, ImageFeaturesMixin, build_projector
from proxyv.model.window import past_length, real_rows

__all__ = ["ProxyVModel"]


class ProxyVModel(ImageFeaturesMixin, LlavaNextModel):  # type: ignore[misc]
    """Vision tower, projector and language model, without the language-model head.

    Args:
        config: the model configuration.

    Raises:
        ValueError: an invalid configuration, or a language-model family without ProxyV layers.
    """

    config: Any  # a ProxyVConfig; transformers types its fields as dictionaries too
    config_class = ProxyVConfig
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: Any) -> None:
        super(LlavaNextModel, self).__init__(config)
        config.check_options()
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.reduction = config.reduction_method
        self.multi_modal_projector = build_projector(config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) / math.sqrt(width))
        self.vocab_size = config.text_config.vocab_size
        options = DecoderOptions.of(config)
        self.language_model = build_language_model(config.text_config, options)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Initialise one module; the projector as torch does by default, like the authors."""
        projector: Any = getattr(self, "multi_modal_projector", None)
        if module is projector and hasattr(module, "init_weights"):
            module.init_weights()
        elif isinstance(projector, LlavaNextMultiModalProjector) and (
            module in (projector.linear_1, projector.linear_2)
        ):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaNextModelOutputWithPast:
        """Run the model; arguments as in ``ProxyVForConditionalGeneration.forward``.

        Those of ``get_image_features`` go there, what is not named here to the language model.
        """
        for unused in ("mm_encoder_outputs", "return_dict"):
            kwargs.pop(unused, None)
        options = {name: kwargs.pop(name, None) for name in FEATURE_OPTIONS}
        past = past_length(kwargs.get("past_key_values"))
        embeds, layout, image_features = self.embed(
            input_ids, pixel_values, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            past=past, **options,
        )  # fmt: skip
        outputs = self.language_model(
            attention_mask=attention_mask, inputs_embeds=embeds, layout=layout, **kwargs
        )
        return LlavaNextModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def embed(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past: int = 0,
        **options: Any,
    ) -> tuple[Tensor, SequenceLayout | None, Tensor | None]:
        """Make what the language model reads; arguments as for ``forward``, ``past`` rows cached.

        Returns:
            (B, S, D) rows; their layout, None without images and where the packing is that of
            the stock model; and (image tokens, D) features, None without images.

        Raises:
            ValueError: image tokens, ``pixel_values`` and ``num_crops`` that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        image_mask = self.image_mask(input_ids, inputs_embeds)
        if input_ids is not None:
            # The image token need not have a row in the embedding: its rows are replaced.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(image_mask, 0))
        assert inputs_embeds is not None
        if pixel_values is None or pixel_values.shape[0] == 0:
            self._refuse_missing_images(image_mask)
            return self._touch_unused(inputs_embeds), None, None
        images: Any = self.get_image_features(pixel_values, **options)
        layout = self._lay_out(images.grids, image_mask, attention_mask, past)
        _check_rows(images.pooler_output, images.grids)
        features = torch.cat(images.pooler_output).to(inputs_embeds)
        return inputs_embeds.masked_scatter(image_mask[..., None], features), layout, features

    def _lay_out(
        self,
        grids: Sequence[ImageGrid],
        image_mask: Tensor,
        attention_mask: Tensor | None,
        past: int,
    ) -> SequenceLayout | None:
        """The layout of a batch with images; None where the packing is that of the stock model.

        Raises:
            ValueError: image tokens and images do not fit together, or a mask that hides some.
        """
        spans = find_images(image_mask, grids)
        if self.config.packing != "crops":
            return None
        real = real_rows(attention_mask, image_mask, past)
        return build_layout(
            spans,
            real,
            self.config.num_proxies,
            released=self.config.layout == "released",
            block=self.config.proxy_block,
        )

    def image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, S) True where the token is the image token."""
        token = self.config.image_token_index
        if input_ids is not None:
            return input_ids == token
        assert inputs_embeds is not None
        embedding: Any = self.get_input_embeddings()
        if token >= embedding.num_embeddings:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=self.device)
        row = embedding(torch.tensor(token, device=inputs_embeds.device)).to(inputs_embeds)
        return (inputs_embeds == row).all(dim=-1)

    def _refuse_missing_images(self, image_mask: Tensor) -> None:
        count = int(image_mask.sum())
        if count:
            raise ValueError(
                f"input_ids holds {count} image tokens (id {self.config.image_token_index}), but "
                "no pixel_values were given"
            )

    def _touch_unused(self, embeds: Tensor) -> Tensor:
        """Give projector and newline, which a batch without images does not run, a zero gradient.

        Data-parallel training waits for the same gradients from every process, also from one
        whose batch happens to hold no image. ProxyV layers see to their own modules.
        """
        if not (self.training and torch.is_grad_enabled()):
            return embeds
        unused = []
        if self.image_newline.requires_grad:
            unused.append(self.image_newline.sum())
        if any(parameter.requires_grad for parameter in self.multi_modal_projector.parameters()):
            layers = self.config.vision_feature_layer
            width = self.config.vision_config.hidden_size
            width *= 1 if isinstance(layers, int) else len(layers)
            # Called, not read: what shards its weights gathers them when it is called.
            shape = (1, self.config.side**2, width)
            crop = self.image_newline.new_zeros(shape, dtype=self.vision_tower.dtype)
            unused.append(self.multi_modal_projector(crop).sum())
        return embeds + 0 * torch.stack(unused).sum().to(embeds) if unused else embeds


def _check_rows(images: Sequence[Tensor], grids: Sequence[ImageGrid]) -> None:
    """Refuse features (rows, D) of each image that do not fill its tokens one by one.

    Scattered all the same, they would stand at the tokens of other crops and images.
    """
    given, wanted = [len(image) for image in images], [grid.num_tokens for grid in grids]
    if given != wanted:
        raise ValueError(
            f"images have {given} rows of features for {wanted} image tokens: the projector must "
            "give one row for each patch that it gets, and a reduction as many as it declares"
        )
