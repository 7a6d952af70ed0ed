"""The whole model: vision tower, projector, newline token, language model with ProxyV layers.

A subclass of transformers' LLaVA-NeXT; what differs is how images are packed (crops one after
another, one newline after each, nothing unpadded, unless ``packing`` asks for the stock way) and
which language model is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlavaNextForConditionalGeneration,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextModel,
    LlavaNextModelOutputWithPast,
    LlavaNextMultiModalProjector,
)
from transformers.utils import can_return_tuple

from proxyv.config import OPTIONS, ProxyVConfig
from proxyv.model.backbones import adopt, materialise
from proxyv.model.card import ModelCardMixin
from proxyv.model.decoder import DecoderOptions
from proxyv.model.families import build_language_model
from proxyv.model.fit import check_fit
from proxyv.model.generation import ImageGenerationMixin
from proxyv.model.head import LanguageHead, supervised_rows
from proxyv.model.layout import SequenceLayout, build_layout, find_images
from proxyv.model.released import check_saved_variant, is_release, read_release
from proxyv.model.vision import ImageFeaturesMixin, build_projector
from proxyv.reduction.base import DecoderReduction
from proxyv.reduction.rows import before_answers

__all__ = ["ProxyVForConditionalGeneration", "ProxyVModel", "parameter_part"]

_PARTS = {
    ".vision_tower.": "vision_tower",
    ".multi_modal_projector.": "projector",
    ".image_newline.": "newline",
    ".guided_update.": "proxyv",
    ".proxy_initializer.": "proxyv",
    ".light_mlp.": "proxyv",
    ".language_model.": "language_model",
    ".lm_head.": "lm_head",
}


def parameter_part(name: str) -> str:
    """Which part of the model a parameter belongs to, by its name.

    Args:
        name: as ``named_parameters`` gives it, prefixes of wrappers included.

    Returns:
        "vision_tower", "projector", "newline", "proxyv", "language_model" or "lm_head".

    Raises:
        ValueError: a name that belongs to no part.
    """
    dotted = f".{name}."
    for mark, part in _PARTS.items():
        if mark in dotted:
            return part
    raise ValueError(f"parameter {name!r} belongs to no part of a ProxyV model")


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
        inside = self.reduction if isinstance(self.reduction, DecoderReduction) else None
        options = DecoderOptions.of(config, inside)
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
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        num_crops: Tensor | None = None,
        pool_sizes: Tensor | None = None,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        judges: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> LlavaNextModelOutputWithPast:
        """Run the model; arguments as in ``ProxyVForConditionalGeneration.forward``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        for unused in ("mm_encoder_outputs", "return_dict"):
            kwargs.pop(unused, None)
        image_mask = self.image_mask(input_ids, inputs_embeds)
        if input_ids is not None:
            # The image token need not have a row in the embedding: its rows are replaced.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(image_mask, 0))
        assert inputs_embeds is not None
        layout: SequenceLayout | None = None
        image_features: Tensor | None = None
        if pixel_values is not None and pixel_values.shape[0] > 0:
            images: Any = self.get_image_features(
                pixel_values,
                image_sizes,
                num_crops,
                pool_sizes,
                vision_feature_layer,
                vision_feature_select_strategy,
            )
            spans = find_images(image_mask, images.grids)
            image_features = torch.cat(images.pooler_output).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], image_features)
            if self.config.packing == "crops":
                layout = build_layout(
                    spans,
                    _real_rows(attention_mask, image_mask),
                    self.config.num_proxies,
                    released=self.config.layout == "released",
                )
        else:
            self._refuse_missing_images(image_mask)
            inputs_embeds = self._touch_unused(inputs_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            layout=layout,
            judges=judges,
            **kwargs,
        )
        return LlavaNextModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
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
        """Give modules that a batch without images does not run a zero gradient.

        Data-parallel training waits for the same gradients from every process, also from one
        whose batch happens to hold no image.
        """
        if not (self.training and torch.is_grad_enabled()):
            return embeds
        unused = [
            parameter.flatten()[:1].sum()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and parameter_part(name) in ("projector", "newline", "proxyv")
        ]
        return embeds + 0 * torch.stack(unused).sum().to(embeds) if unused else embeds


class ProxyVForConditionalGeneration(  # type: ignore[misc]
    ModelCardMixin, ImageGenerationMixin, LlavaNextForConditionalGeneration
):
    """ProxyV with its language-model head: training loss and generation.

    Args:
        config: the model configuration; ``start_layer=None`` builds the baseline.
    """

    config: Any  # a ProxyVConfig; transformers types its fields as dictionaries too
    config_class = ProxyVConfig
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: Any) -> None:
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = ProxyVModel(config)
        text_config = config.text_config
        self.lm_head = LanguageHead(text_config.hidden_size, text_config.vocab_size)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model as every transformers model is loaded, then freeze what nothing reads.

        The authors' releases load too, by folder or hub id, as ``layout: released``.

        Args:
            pretrained_model_name_or_path: folder or hub id; None where ``config`` and
                ``state_dict`` are given.
            *args: passed on.
            **kwargs: passed on; fields of ``ProxyVConfig`` set the configuration.

        Raises:
            ValueError: fields, or a ``config.json``, that contradict the weights: another start
                layer, kind of proxies, depth or width.
        """
        name = pretrained_model_name_or_path
        if name is not None:
            check_saved_variant(name, kwargs)
        if name is not None and is_release(name, **kwargs):
            fields = {key: kwargs.pop(key) for key in set(kwargs) & set(OPTIONS)}
            kwargs |= read_release(name, fields, **kwargs)
            name = None
        report_wanted = kwargs.pop("output_loading_info", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, report = loaded
        source = pretrained_model_name_or_path or "the given state_dict"
        check_fit(source, model.config, report, model.state_dict().keys(), sizes=not any_size)
        model.freeze_unused()
        return (model, report) if report_wanted else model

    def freeze_unused(self) -> list[str]:
        """Freeze the new modules of the last layer, which nothing reads.

        It stays in checkpoints, because the released ones hold it, but never gets a gradient;
        data-parallel training would wait for one. Building and loading a model call this; call
        it again after ``requires_grad_`` was set on whole modules.

        Returns:
            The names of the frozen parameters; none for a baseline.
        """
        layers = self.model.language_model.layers
        last = f".layers.{len(layers) - 1}."
        frozen = []
        for name, parameter in self.named_parameters():
            if last in name and parameter_part(name) == "proxyv":
                parameter.requires_grad_(False)
                frozen.append(name)
        return frozen

    def fuse(self) -> ProxyVForConditionalGeneration:
        """Fold the guided updates for inference: the same numbers, fewer operations.

        Undone by ``train()`` and by loading other weights; checkpoints stay unfolded. A baseline
        has nothing to fold.

        Returns:
            The model itself.

        Raises:
            ValueError: the model is in training mode, or its weights cannot be read as they are.
        """
        for layer in self.model.language_model.layers:
            update = getattr(layer, "guided_update", None)
            if update is not None and not layer.is_last:
                update.fuse()
        return self

    @classmethod
    def from_backbones(
        cls,
        vision: str | Path,
        language: str | Path,
        *,
        config_overrides: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        language_kwargs: dict[str, Any] | None = None,
    ) -> ProxyVForConditionalGeneration:
        """Join a CLIP vision tower and a language model; everything between them starts fresh.

        Args:
            vision: folder or hub id of a CLIP (vision) model.
            language: folder or hub id of a causal language model.
            config_overrides: fields of ``ProxyVConfig``, such as ``start_layer`` or
                ``image_token_index``.
            dtype: of all weights; float32 by default, whatever the backbones are stored in.
            language_kwargs: for loading the language model, such as ``gguf_file``.

        Returns:
            The model, in evaluation mode. New modules are drawn from torch's global generator.

        Raises:
            ValueError: an option that ``ProxyVConfig`` refuses, or a backbone whose weights do
                not fit its configuration.
        """
        dtype = dtype or torch.float32
        tower = CLIPVisionModel.from_pretrained(vision, dtype=dtype)
        decoder = AutoModelForCausalLM.from_pretrained(
            language, dtype=dtype, **(language_kwargs or {})
        )
        text_config = decoder.config
        overrides = {
            "tie_word_embeddings": text_config.tie_word_embeddings,
            **(config_overrides or {}),
        }
        config = ProxyVConfig(
            vision_config=tower.config.to_dict(), text_config=text_config.to_dict(), **overrides
        )
        with torch.device("meta"):  # no second copy of the backbones, nothing drawn twice
            model = cls._from_config(config, dtype=dtype)
        adopt(model.model.vision_tower, tower, str(vision))
        adopt(model.model.language_model, decoder.get_decoder(), str(language))
        if not config.tie_word_embeddings:
            adopt(model.lm_head, decoder.get_output_embeddings(), str(language))
        materialise(model)
        model.initialize_weights()
        model.tie_weights()
        model.freeze_unused()
        if decoder.can_generate():
            model.generation_config = decoder.generation_config
        return model.eval()

    def get_image_features(  # type: ignore[override]
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See ``ProxyVModel.get_image_features``."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        num_crops: Tensor | None = None,
        pool_sizes: Tensor | None = None,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        judges: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> LlavaNextCausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: (B, S); an image of C crops is C*(s*s+1) image tokens in a row.
            pixel_values: (images, C_max, 3, height, width), images in row order and order of
                appearance, padded with any crops; or (images, 3, height, width) with one crop
                each. Leave out for text only.
            image_sizes: (images, 2) height and width; needed by packing "llava_next" only.
            attention_mask: (B, past + S), 0 where a token is padding, on either side.
            position_ids: (B, S); default: counted over real tokens.
            past_key_values: cache of earlier tokens.
            inputs_embeds: (B, S, D) in place of ``input_ids``.
            num_crops: (images,) crops of each image; default C_max.
            pool_sizes: (images,) patches a side that one token stands for, 2 for video frames;
                default 1. It shortens the image to C*((s/pool)^2+1) tokens.
            vision_feature_layer: layer(s) of the tower, default from the configuration.
            vision_feature_select_strategy: "default" or "full", default from the configuration.
            labels: (B, S) targets, -100 where none.
            judges: (B, S) True at rows by whose attention a method inside the decoder chooses
                image tokens; default: the rows right before answers where labels are given, else
                the last row.
            use_cache: return a cache.
            logits_to_keep: compute logits of the last so many rows (0: all), or of given rows.
            loss_only: compute the loss from supervised rows alone, and no logits: for training.
            **kwargs: passed on; ``num_items_in_batch`` divides the summed loss.

        Returns:
            Loss (where labels are given), logits (B, rows, vocabulary), cache and what was asked
            for. Logits of full rows come from hidden states that skipped the last layer and
            carry no meaning; those of padding rows neither.

        Raises:
            ValueError: image tokens, ``pixel_values`` and ``num_crops`` that do not fit together.
        """
        kwargs.pop("return_dict", None)
        if judges is None and labels is not None:
            judges = before_answers(labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_crops=num_crops,
            pool_sizes=pool_sizes,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            judges=judges,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = loss = None
        if loss_only:
            loss = self._supervised_loss(hidden_states, labels, kwargs.get("num_items_in_batch"))
        else:
            logits = self.lm_head(hidden_states)
        if labels is not None and not loss_only:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return LlavaNextCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _supervised_loss(
        self, hidden: Tensor, labels: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        """Cross entropy over ``num_items`` (default: the supervised tokens here); 0 where none."""
        if labels is None or labels.shape[1] != hidden.shape[1]:
            raise ValueError("loss_only=True needs labels, and no logits_to_keep")
        rows, targets = supervised_rows(hidden, labels)
        count = torch.as_tensor(len(targets) if num_items is None else num_items)
        return self.lm_head(rows, targets) / count.to(rows.device).clamp(min=1)

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and keywords.get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True loses the gradients of ProxyV "
                "layers: use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)


def _real_rows(attention_mask: Tensor | None, image_mask: Tensor) -> Tensor:
    """(B, S) False where a new row is padding."""
    if attention_mask is None:
        return torch.ones_like(image_mask)
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions: with images it must be "
            "(B, tokens)"
        )
    return attention_mask[:, -image_mask.shape[1] :].bool().to(image_mask.device)
