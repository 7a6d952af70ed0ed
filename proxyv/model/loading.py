"""Ways to a model's weights: a folder or the hub, the authors' releases, two backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel

from proxyv.config import OPTIONS, ProxyVConfig
from proxyv.model.backbones import adopt, materialise
from proxyv.model.fit import check_fit
from proxyv.model.released import (
    check_saved_variant,
    is_release,
    keep_learned_proxies,
    read_release,
)

__all__ = ["LoadingMixin"]


class LoadingMixin:
    """Loading of a whole model; put it before the stock class.

    The class it is mixed into has ``freeze_unused``.
    """

    _from_config: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as every transformers model is loaded, then freeze what nothing reads.

        The authors' releases load too, by folder or hub id, as ``layout: released``.

        Args:
            pretrained_model_name_or_path: folder or hub id; None where ``config`` and
                ``state_dict`` are given.
            *args: passed on.
            **kwargs: passed on; fields of ``ProxyVConfig`` set the configuration.

        Raises:
            ValueError: fields, or a ``config.json``, that contradict the weights: another start
                layer, kind of proxies, depth or width; or weights with holes. New modules may
                only start anew as ``check_fit`` says, and none where a release is read.
        """
        name = pretrained_model_name_or_path
        released = name is not None and is_release(name, **kwargs)
        if name is not None:
            check_saved_variant(name, kwargs)
            kwargs = keep_learned_proxies(name, kwargs)
        if released:
            fields = {key: kwargs.pop(key) for key in set(kwargs) & set(OPTIONS)}
            kwargs |= read_release(name, fields, **kwargs)
            name = None
        report_wanted = kwargs.pop("output_loading_info", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        parent: Any = super()
        loaded: Any = parent.from_pretrained(
            name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, report = loaded
        source = pretrained_model_name_or_path or "the given state_dict"
        expected = model.state_dict().keys()
        check_fit(source, model.config, report, expected, sizes=not any_size, fresh=not released)
        model.freeze_unused()
        return (model, report) if report_wanted else model

    @classmethod
    def from_backbones(
        cls,
        vision: str | Path,
        language: str | Path,
        *,
        config_overrides: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        language_kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
