"""A stock LLaVA-NeXT checkpoint as a baseline of this package: same weights, same packing."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv.config import ProxyVConfig
from proxyv.model.fit import check_complete
from proxyv.model.modeling import ProxyVForConditionalGeneration
from proxyv.model.processing import ProxyVProcessor

__all__ = ["read_stock", "suggested_template"]

# What a rendered question of a stock chat template holds, and which of ours says the same.
_SIGNS = (
    ("USER:", "v1"),
    ("<|start_header_id|>", "llama3"),
    ("You are a helpful assistant.<|im_end|>", "qwen"),
)


def read_stock(name: str, **options: Any) -> tuple[Any, ProxyVProcessor]:
    """Load a LLaVA-NeXT of transformers as a model without proxies, with ``packing: llava_next``.

    Args:
        name: folder or hub id, such as ``llava-hf/llava-v1.6-vicuna-7b-hf``.
        **options: passed on to ``from_pretrained``, such as ``dtype``.

    Returns:
        The model and its processor. Every tensor keeps its bits.

    Raises:
        ValueError: weights with holes, which transformers would fill at random.
    """
    loaded: Any = LlavaNextForConditionalGeneration.from_pretrained(
        name, output_loading_info=True, **options
    )
    stock, report = loaded
    check_complete(name, report["missing_keys"])
    raw = stock.config.to_dict()
    for field in ("model_type", "architectures", "transformers_version"):
        raw.pop(field, None)
    config = ProxyVConfig(**raw, start_layer=None, packing="llava_next")
    model = ProxyVForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=stock.state_dict(),
        dtype=stock.dtype,
        attn_implementation=stock.config._attn_implementation,
    )
    model.generation_config = stock.generation_config
    theirs: Any = AutoProcessor.from_pretrained(name)
    processor = ProxyVProcessor(
        LlavaNextImageProcessorPil.from_dict(theirs.image_processor.to_dict()),
        theirs.tokenizer,
        patch_size=theirs.patch_size or config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=theirs.chat_template,
        image_token=theirs.image_token,
        packing="llava_next",
    )
    return model, processor


def suggested_template(processor: Any) -> str | None:
    """The chat template of ours that asks as the stock one does; None where none is known to."""
    if not processor.chat_template:
        return None
    question = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    try:
        asked = processor.apply_chat_template([question], add_generation_prompt=True)
    except (TemplateError, TypeError):  # a template for messages of another form
        return None
    return next((template for sign, template in _SIGNS if sign in asked), None)
