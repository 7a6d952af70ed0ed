"""The whole model: language-model head, training loss and generation over ``ProxyVModel``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from proxyv.config import ProxyVConfig
from proxyv.model.card import ModelCardMixin
from proxyv.model.generation import ImageGenerationMixin
from proxyv.model.head import LanguageHead, as_language_head, summed_loss, supervised_rows
from proxyv.model.loading import LoadingMixin
from proxyv.model.multimodal import ProxyVModel
from proxyv.model.parts import parameter_part
from proxyv.reduction.rows import before_answers

__all__ = ["ProxyVForConditionalGeneration"]


class ProxyVForConditionalGeneration(  # type: ignore[misc]
    ModelCardMixin, LoadingMixin, ImageGenerationMixin, LlavaNextForConditionalGeneration
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
        self.model.language_model.fuse()
        return self

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
            input_ids=input_ids, pixel_values=pixel_values, image_sizes=image_sizes,
            attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            num_crops=num_crops, pool_sizes=pool_sizes,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            judges=judges, use_cache=use_cache, return_dict=True, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        score = self._supervised_loss if loss_only else self._logits_and_loss
        logits, loss = score(outputs.last_hidden_state[:, kept], labels, kwargs)
        return LlavaNextCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _logits_and_loss(
        self, hidden: Tensor, labels: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, rows, vocabulary), and their loss where there are labels."""
        logits = self.lm_head(hidden)
        if labels is None:
            return logits, None
        vocab_size = self.config.text_config.vocab_size
        return logits, self.loss_function(
            logits=logits, labels=labels, vocab_size=vocab_size, **kwargs
        )

    def _supervised_loss(
        self, hidden: Tensor, labels: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[None, Tensor]:
        """No logits; cross entropy of supervised rows, 0 where none.

        The sum is divided by ``num_items_in_batch``, by default the supervised tokens here.
        """
        if labels is None or labels.shape[1] != hidden.shape[1]:
            raise ValueError("loss_only=True needs labels, and no logits_to_keep")
        rows, targets = supervised_rows(hidden, labels)
        num_items = kwargs.get("num_items_in_batch")
        count = torch.as_tensor(len(targets) if num_items is None else num_items)
        loss = summed_loss(self.lm_head, rows, targets)
        return None, loss / count.to(rows.device).clamp(min=1)

    def _get_resized_lm_head(self, *args: Any, **kwargs: Any) -> nn.Linear:
        head = super()._get_resized_lm_head(*args, **kwargs)
        return head if isinstance(head, LanguageHead) else as_language_head(head)

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
