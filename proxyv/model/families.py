"""The families of language models that ProxyV layers exist for, one row each.

A family is two thin subclasses, of its stock decoder layer and of its stock model, that differ
from the other families in what the stock classes differ in. ``docs/adding_a_family.md`` is the
recipe for another one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    LlamaModel,
    MistralModel,
    Phi3Model,
    PreTrainedConfig,
    Qwen2Model,
    Qwen3Model,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils.output_capturing import OutputRecorder

from proxyv.model.decoder import ProxyVLayerMixin
from proxyv.model.language import ProxyVTextMixin
from proxyv.model.streams import DecoderOptions, WeightsTap

__all__ = [
    "FAMILIES",
    "ProxyVLlamaDecoderLayer",
    "ProxyVLlamaModel",
    "ProxyVMistralDecoderLayer",
    "ProxyVMistralModel",
    "ProxyVPhi3DecoderLayer",
    "ProxyVPhi3Model",
    "ProxyVQwen2DecoderLayer",
    "ProxyVQwen2Model",
    "ProxyVQwen3DecoderLayer",
    "ProxyVQwen3Model",
    "build_language_model",
]


class ProxyVLlamaDecoderLayer(ProxyVLayerMixin, modeling_llama.LlamaDecoderLayer):
    """A ProxyV layer of the Llama family (Llama, Vicuna, Llama 3, SmolLM2, InternLM2.5)."""

    _eager_attention = staticmethod(modeling_llama.eager_attention_forward)


class ProxyVMistralDecoderLayer(ProxyVLayerMixin, modeling_mistral.MistralDecoderLayer):
    """A ProxyV layer of the Mistral family, without its sliding window."""

    _eager_attention = staticmethod(modeling_mistral.eager_attention_forward)


class ProxyVQwen2DecoderLayer(ProxyVLayerMixin, modeling_qwen2.Qwen2DecoderLayer):
    """A ProxyV layer of the Qwen2 family: query, key and value have biases."""

    _eager_attention = staticmethod(modeling_qwen2.eager_attention_forward)


class ProxyVQwen3DecoderLayer(ProxyVLayerMixin, modeling_qwen3.Qwen3DecoderLayer):
    """A ProxyV layer of the Qwen3 family: heads of query and key are normalised."""

    _eager_attention = staticmethod(modeling_qwen3.eager_attention_forward)

    def _project(self, rows: Tensor, with_query: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        query, key, value = super()._project(rows, with_query)
        attn = self.self_attn
        return None if query is None else attn.q_norm(query), attn.k_norm(key), value


class ProxyVPhi3DecoderLayer(ProxyVLayerMixin, modeling_phi3.Phi3DecoderLayer):
    """A ProxyV layer of the Phi3 family: one fused projection, dropouts before each addition."""

    _eager_attention = staticmethod(modeling_phi3.eager_attention_forward)

    def _project(self, rows: Tensor, with_query: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """As of every family; full rows compute queries that nobody reads.

        Leaving them out would mean reading rows of the fused weight, past any adapter.
        """
        attn = self.self_attn
        keys = attn.num_key_value_heads
        heads = self._heads(attn.qkv_proj(rows))  # (B, H+2*keys, N, h)
        query, key, value = heads.split([heads.shape[1] - 2 * keys, keys, keys], dim=1)
        return query if with_query else None, key, value

    def _after_attention(self, rows: Tensor) -> Tensor:
        return self.resid_attn_dropout(rows)

    def _after_mlp(self, rows: Tensor) -> Tensor:
        return self.resid_mlp_dropout(rows)


def _recorded(layer: type[nn.Module], attention: type[nn.Module]) -> dict[str, Any]:
    """What ``output_hidden_states`` and ``output_attentions`` collect from a family's model."""
    taps = [OutputRecorder(attention, index=1), OutputRecorder(WeightsTap, index=0)]
    return {"hidden_states": layer, "attentions": taps}


class ProxyVLlamaModel(ProxyVTextMixin, LlamaModel):
    """A Llama whose layers from ``start_layer`` on are ProxyV layers."""

    proxyv_layer = ProxyVLlamaDecoderLayer
    _no_split_modules = ["LlamaDecoderLayer", "ProxyVLlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaAttention)


class ProxyVMistralModel(ProxyVTextMixin, MistralModel):
    """A Mistral whose layers from ``start_layer`` on are ProxyV layers."""

    proxyv_layer = ProxyVMistralDecoderLayer
    _no_split_modules = ["MistralDecoderLayer", "ProxyVMistralDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(
        modeling_mistral.MistralDecoderLayer, modeling_mistral.MistralAttention
    )


class ProxyVQwen2Model(ProxyVTextMixin, Qwen2Model):
    """A Qwen2 whose layers from ``start_layer`` on are ProxyV layers."""

    proxyv_layer = ProxyVQwen2DecoderLayer
    _no_split_modules = ["Qwen2DecoderLayer", "ProxyVQwen2DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(modeling_qwen2.Qwen2DecoderLayer, modeling_qwen2.Qwen2Attention)


class ProxyVQwen3Model(ProxyVTextMixin, Qwen3Model):
    """A Qwen3 whose layers from ``start_layer`` on are ProxyV layers."""

    proxyv_layer = ProxyVQwen3DecoderLayer
    _no_split_modules = ["Qwen3DecoderLayer", "ProxyVQwen3DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(modeling_qwen3.Qwen3DecoderLayer, modeling_qwen3.Qwen3Attention)


class ProxyVPhi3Model(ProxyVTextMixin, Phi3Model):
    """A Phi3 whose layers from ``start_layer`` on are ProxyV layers."""

    proxyv_layer = ProxyVPhi3DecoderLayer
    _no_split_modules = ["Phi3DecoderLayer", "ProxyVPhi3DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(modeling_phi3.Phi3DecoderLayer, modeling_phi3.Phi3Attention)


FAMILIES: dict[str, type[Any]] = {
    "llama": ProxyVLlamaModel,
    "mistral": ProxyVMistralModel,
    "phi3": ProxyVPhi3Model,
    "qwen2": ProxyVQwen2Model,
    "qwen3": ProxyVQwen3Model,
}


def build_language_model(text_config: PreTrainedConfig, options: DecoderOptions) -> Any:
    """Build the language model of the family that ``text_config`` belongs to.

    Args:
        text_config: the stock configuration of the family.
        options: what ProxyV adds.

    Raises:
        ValueError: no family of that name, or a sliding window where it would hide image rows, or
            where our own masks would ignore it.
    """
    model = FAMILIES.get(text_config.model_type)
    if model is None:
        raise ValueError(
            f"text_config.model_type={text_config.model_type!r} has no ProxyV layers: use one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    _refuse_window(getattr(text_config, "sliding_window", None), options)
    return model._from_config(text_config, options=options)


def _refuse_window(window: int | None, options: DecoderOptions) -> None:
    """Refuse a sliding window in a model whose layers do not all get the stock masks."""
    if window is None:
        return
    if options.start_layer is not None:
        raise ValueError(
            f"text_config.sliding_window={window} would hide image rows from the text: set it to "
            "null, or start_layer to null for the baseline"
        )
    if options.released or options.reduction is not None or options.image_decides:
        change = "layout to 'natural'" if options.released else "reduction to null"
        raise ValueError(
            f"text_config.sliding_window={window} would be ignored by the masks that this model "
            f"needs for its image rows: set it to null, or {change}"
        )
