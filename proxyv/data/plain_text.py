"""A tokenizer for what people and data sets say: nothing in it is read as a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

__all__ = ["plain_text_tokenizer"]

_CONTROL_FORM = re.compile(r"<[|/]?[^<>\s]+>")
"""How control tokens look; some vocabularies do not call all of theirs special."""


def plain_text_tokenizer(
    backend: Tokenizer, controls: Iterable[str]
) -> tuple[Tokenizer, bool, dict[int, int]]:
    """Make a tokenizer that sees no control tokens and adds no dummy space.

    Returns:
        The tokenizer, which shares the vocabulary of the original, and whether the original
        prefixes a text with a (sentencepiece) dummy space. The renderer then puts that space
        exactly where the reference has it: at the start of a row and after an image, but not after
        a control token. Last, the real id of each added token that is no control token, by the id
        that it has here.
    """
    light = Tokenizer(BPE())
    if backend.normalizer is not None:
        light.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        light.pre_tokenizer = backend.pre_tokenizer
    state = json.loads(light.to_str())
    dummy_space = False
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            step["prepend_scheme"], dummy_space = "never", True
    for step in _steps(state["normalizer"], "normalizers"):
        if step["type"] == "Prepend":
            step["prepend"], dummy_space = "", True
    plain = Tokenizer.from_str(json.dumps(state))
    plain.model = backend.model
    hidden = set(controls)
    numbers: dict[int, int] = {}
    for number, token in sorted(backend.get_added_tokens_decoder().items()):
        control = token.special or token.content in hidden or _CONTROL_FORM.fullmatch(token.content)
        if not control:
            plain.add_tokens([token])
            numbers[plain.encode(token.content, add_special_tokens=False).ids[0]] = number
    return plain, dummy_space, numbers


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer component, whether it is one or a sequence."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]
