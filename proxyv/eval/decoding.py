"""Greedy answers of a batch: beginnings that rows share are read once, rows that are done leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

__all__ = ["Prompts", "answer_ids", "can_stop", "pad_left"]

ROUND = 16
"""Tokens that are written before rows may leave: choosing rows costs about what one step does."""

COUNTED = (
    "cache_implementation",
    "min_new_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "max_time",
)
"""Options of generation that would begin anew, or hold rows that cannot be chosen."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, padded on the left, on the CPU.

    Attributes:
        rows: ``input_ids`` and ``attention_mask`` (B, S), and the images unless `openings` has
            them.
        openings: the same of what rows begin with, up to the last image token, once for each set
            of images: (U, P), the first P columns of rows. None where nothing is shared.
        owners: (B,) the opening of each row; None likewise.
    """

    rows: dict[str, Tensor]
    openings: dict[str, Tensor] | None = None
    owners: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows["input_ids"])


class _Ended(StoppingCriteria):
    """Stops all rows once half of them have ended and a round is over.

    Args:
        start: columns of the prompt.
        ends: (E,) tokens that end an answer.
    """

    def __init__(self, start: int, ends: Tensor) -> None:
        self.start, self.ends = start, ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) True where the row stops."""
        new = input_ids[:, self.start :]
        if new.shape[1] < ROUND:
            return torch.zeros(len(new), dtype=torch.bool, device=new.device)
        ended = torch.isin(new, self.ends).any(dim=1)
        return (2 * ended.sum() >= len(new)).expand(len(new))


def can_stop(model: Any) -> bool:
    """Whether a model's generation can be stopped and go on with some rows as if it had not."""
    config = model.generation_config
    return all(getattr(config, name, None) in (None, "dynamic") for name in COUNTED)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (B, S) of rows of different lengths."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.inference_mode()
def answer_ids(
    model: Any, prompts: Prompts, max_new_tokens: int, ends: Sequence[int], pad: int
) -> list[list[int]]:
    """Answer a batch greedily.

    Args:
        model: any model with ``generate``; with `Prompts.openings`, one of this package.
        prompts: the batch.
        max_new_tokens: longest answer.
        ends: tokens that end one.
        pad: token of padding.

    Returns:
        The new tokens of each row, the one that ends them included.
    """
    inputs = _on(model, prompts.rows)
    cache = None
    if prompts.openings is not None:
        opened = model(**_on(model, prompts.openings), use_cache=True, logits_to_keep=1)
        cache = opened.past_key_values
        del opened  # and the images' features with it
        assert prompts.owners is not None, "openings have rows that begin with them"
        cache.batch_select_indices(prompts.owners.to(model.device))
    answers: list[list[int]] = [[] for _ in range(len(prompts))]
    going = list(range(len(prompts)))
    end_ids = torch.tensor(ends, device=model.device)
    while True:
        start, written = inputs["input_ids"].shape[1], len(answers[going[0]])
        found = model.generate(
            **inputs,
            past_key_values=cache,
            use_cache=True,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens - written,
            eos_token_id=list(ends),
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([_Ended(start, end_ids)] * can_stop(model)),
            return_dict_in_generate=True,
        )
        new = found.sequences[:, start:]  # (rows that go on, new tokens)
        is_end = torch.isin(new, end_ids)
        lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, new.shape[1])
        for row, ids, length in zip(going, new.tolist(), lengths.tolist(), strict=True):
            answers[row] += ids[:length]
        left = (~is_end.any(dim=1)).nonzero().flatten()  # of this round's rows
        going = [going[place] for place in left.tolist()]
        if not going or written + new.shape[1] >= max_new_tokens:
            return answers
        cache = found.past_key_values
        cache.batch_select_indices(left)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new.shape[1]), value=1)
        inputs = {"input_ids": found.sequences[left], "attention_mask": mask[left]}


def _on(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the model's device, pixels in its type."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
    }
