"""Generation through transformers' ``generate``, with a cache whose layers differ in length."""

from __future__ import annotations

import pytest
import torch
from test_reduction_decoder import METHODS, one_image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from proxyv.reduction.base import DecoderReduction
from proxyv.reduction.decoding import run_reduced
from proxyv.reduction.fitprune import FitPrune
from proxyv.reduction.rows import Rows
from proxyv.reduction.stages import stages_of

FITPRUNE = FitPrune((1, 2, 0, 3, 1, 0), 12)


class ReducedLlama(LlamaModel):
    """The least that a language model has to do to take a method in."""

    method: DecoderReduction
    prompt_length: int

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, image_mask):
        embeds = self.embed_tokens(input_ids)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows = None
        if not cached:
            # Without a cache every step reads all rows; the prompt's last one always judges.
            added = input_ids.shape[1] - image_mask.shape[1]
            judges = torch.zeros_like(input_ids, dtype=torch.bool)
            judges[:, image_mask.shape[1] - 1] = True
            rows = Rows.build(
                torch.nn.functional.pad(image_mask, (0, added)),
                valid=attention_mask,
                positions=position_ids,
                judges=judges,
            )
        hidden, left = run_reduced(
            self, self.method, embeds, rows=rows, attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values,
        )  # fmt: skip
        if left is not None:
            hidden = left.restore(hidden, input_ids.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


class ReducedLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig, method: DecoderReduction) -> None:
        super().__init__(config)
        self.model = ReducedLlama(config)
        self.model.method = method

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        use_cache=None, image_mask=None, **kwargs,
    ):  # fmt: skip
        cache = (past_key_values or DynamicCache(config=self.config)) if use_cache else None
        out = self.model(input_ids, attention_mask, position_ids, cache, image_mask)
        logits = self.lm_head(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def build(method: DecoderReduction, attention: str) -> ReducedLlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        num_hidden_layers=6, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_implementation=attention,
    )  # fmt: skip
    model = ReducedLlamaForCausalLM(config, method).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    masks = [
        one_image(20, 3, 12)[0],
        (one_image(24, 2, 8) | one_image(24, 12, 8))[0],
        torch.zeros(9, dtype=torch.bool),
    ]
    return [(torch.randint(3, 40, mask.shape, generator=generator), mask) for mask in masks]


def left_padded(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    most = max(len(mask) for _, mask in parts)

    def stack(rows: list[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(r, (most - len(r), 0)) for r in rows])

    return {
        "input_ids": stack([ids for ids, _ in parts]),
        "image_mask": stack([mask for _, mask in parts]),
        "attention_mask": stack([torch.ones_like(ids) for ids, _ in parts]),
    }


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", [*METHODS, FITPRUNE], ids=str)
def test_generation_batch_equals_single_and_cached_equals_uncached(
    method, attention, beams
) -> None:
    model = build(method, attention)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    batch = left_padded(prompts())
    together = model.generate(**batch, **options)[:, -5:]
    for row, part in enumerate(prompts()):
        single = left_padded([part])
        assert model.generate(**single, **options)[:, -5:].tolist() == [together[row].tolist()]
    uncached = model.generate(**batch, **options, use_cache=False)[:, -5:]
    assert uncached.tolist() == together.tolist()


@pytest.mark.parametrize("method", [*METHODS, FITPRUNE], ids=str)
def test_the_cache_holds_what_is_left(method) -> None:
    model = build(method, "sdpa")
    out = model.generate(
        **left_padded(prompts()), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    lengths = [out.past_key_values.get_seq_length(i) for i in range(6)]
    assert lengths[0] == 24 + 3 and lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0]
    stages = stages_of(out.past_key_values)
    assert stages is not None
    assert sorted({stage.valid.shape[1] for stage in stages}) == sorted(set(lengths))
