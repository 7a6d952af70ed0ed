"""A tokenizer for what people and data sets say: nothing in it is read as a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

__all__ = ["PlainText"]

_CONTROL_FORM = re.compile(r"<[|/]?[^<>\s]+>")
"""How control tokens look; some vocabularies do not call all of theirs special."""


class PlainText:
    """A tokenizer that sees no control tokens and adds no dummy space.

    It shares the vocabulary of the original.

    Args:
        backend: the original.
        controls: names of tokens that are control tokens whatever the original says of them.

    Attributes:
        dummy_space: whether the original prefixes a text with a (sentencepiece) dummy space. The
            renderer puts that space exactly where the reference has it: at the start of a row and
            after an image, but not after a control token.
    """

    def __init__(self, backend: Tokenizer, controls: Iterable[str]) -> None:
        self._tokenizer, self.dummy_space = _without_dummy_space(backend)
        names = set(controls)
        self._numbers: dict[int, int] = {}  # id here to id there, of plain added tokens
        hidden = {}
        for number, token in sorted(backend.get_added_tokens_decoder().items()):
            name = token.content
            if token.special or name in names or _CONTROL_FORM.fullmatch(name):
                hidden[number] = name
            else:
                self._tokenizer.add_tokens([token])
                here = self._tokenizer.encode(name, add_special_tokens=False).ids[0]
                self._numbers[here] = number
        self._hidden = frozenset(hidden)
        longest_first = sorted((n for n in hidden.values() if len(n) > 1), key=len, reverse=True)
        self._inside = re.compile(
            "|".join(
                f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in longest_first
            )
            or "(?!)"
        )

    def ids(self, text: str) -> list[int]:
        """Ids of a text, none of them a control token's.

        Some vocabularies can spell a control token from its letters: such a text is taken apart
        behind the first letter of the name.
        """
        ids = self._encode(text)
        if self._hidden.isdisjoint(ids):
            return ids
        return [token for piece in self._inside.split(text) for token in self._encode(piece)]

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._numbers.get(token, token) for token in ids] if self._numbers else ids


def _without_dummy_space(backend: Tokenizer) -> tuple[Tokenizer, bool]:
    """A tokenizer without added tokens and dummy space, and whether there was such a space."""
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
    return plain, dummy_space


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer component, whether it is one or a sequence."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]
