"""Chat templates: a conversation becomes token ids and labels, built together turn by turn.

A template is a row of the table in ``proxyv/model/chat_templates.py``; :class:`Renderer` does the
work for all of them.
Labels are exactly the answers and their end tokens; a token that an answer shares with the newline
before it, because it begins with one itself, belongs to the answer. Text that a user or a data set
brings is never read as control tokens: ``</s>`` written in a question is five characters.

Source: authors' ``llava/conversation.py`` and ``preprocess_*`` (``train.py``).
Differs: ids and labels are made in one pass instead of re-tokenizing pieces and subtracting; an
empty answer supervises its end token; control tokens in text stay text.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from proxyv.cli import nearest
from proxyv.data.plain_text import PlainText
from proxyv.model.chat_templates import IMAGE_MARK, TEMPLATES, Bos, Control, Message, Part, Template
from proxyv.model.head import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_MARK",
    "TEMPLATES",
    "Rendered",
    "Renderer",
    "Turn",
    "as_turns",
    "mark_template",
    "template_of",
]


Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, and what is said (``<image>`` marks an image)."""

    role: Role
    text: str


@dataclass(frozen=True)
class Rendered:
    """Token ids and labels of a conversation, two lists of the same length.

    ``hidden`` counts the supervised tokens that were cut off at a length limit.
    """

    input_ids: list[int]
    labels: list[int]
    hidden: int = 0

    @property
    def num_supervised(self) -> int:
        """How many positions carry a label."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    def cut(self, length: int) -> Rendered:
        """The first ``length`` positions, with a count of what that hides of the answers."""
        kept = Rendered(self.input_ids[:length], self.labels[:length])
        return replace(kept, hidden=self.hidden + self.num_supervised - kept.num_supervised)


def as_turns(conversation: Iterable[Turn | Mapping[str, Any]]) -> list[Turn]:
    """Read a conversation in either common form.

    Args:
        conversation: :class:`Turn` objects, or mappings with ``from`` and ``value`` (roles human,
            gpt, system) or with ``role`` and ``content`` (roles user, assistant, system).

    Raises:
        ValueError: a message has no text, text that is no Unicode, or a role nobody knows.
    """
    turns: list[Turn] = []
    for number, message in enumerate(conversation):
        if isinstance(message, Turn):
            _check_unicode(f"message {number} (from {message.role!r})", message.text)
            turns.append(message)
            continue
        role = message.get("from", message.get("role"))
        text = message.get("value", message.get("content"))
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"message {number}: {nearest('role', str(role), _ROLES)}")
        if not isinstance(text, str):
            raise ValueError(
                f"message {number} (from {role!r}): the text must be a string, got {text!r}"
            )
        _check_unicode(f"message {number} (from {role!r})", text)
        turns.append(Turn(_ROLES[role], text))
    return turns


def _check_unicode(where: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} of the text is {text[error.start]!a}, half of a "
            "surrogate pair and no Unicode; write the whole character, or leave it out"
        ) from error


def template_of(tokenizer: Any, name: str = "auto") -> Template:
    """Find a template by name; ``auto`` takes the one that the tokenizer was saved with.

    Raises:
        ValueError: no template of that name, or ``auto`` with a tokenizer that names none.
    """
    if name == "auto":
        name = tokenizer.init_kwargs.get("proxyv_template", "")
        if not name:
            raise ValueError(
                "template 'auto': this tokenizer was not saved by a ProxyV run, so nothing says "
                f"which template it wants; name one of {', '.join(sorted(TEMPLATES))}"
            )
    if name not in TEMPLATES:
        raise ValueError(nearest("template", name, TEMPLATES))
    return TEMPLATES[name]


def mark_template(tokenizer: Any, template: Template) -> None:
    """Write the template into a tokenizer, so that a saved folder says how to talk to it."""
    tokenizer.init_kwargs["proxyv_template"] = template.name
    if not tokenizer.chat_template:
        tokenizer.chat_template = template.chat_template()


@dataclass
class _Pieces:
    """A conversation on its way to ids: runs of text, control tokens and images, in order."""

    items: list[tuple[str, str | int, bool]] = field(default_factory=list)

    def text(self, text: str, supervised: bool) -> None:
        """Add text; it joins the run before it where both are supervised, or both are not."""
        if not text:
            return
        if self.items and self.items[-1][0] == "text" and self.items[-1][2] == supervised:
            text = str(self.items.pop()[1]) + text
        self.items.append(("text", text, supervised))

    def control(self, token: str, supervised: bool) -> None:
        """Add one control token."""
        self.items.append(("control", token, supervised))

    def start(self) -> None:
        """Turn the control tokens so far into a beginning: what follows still begins a text."""
        self.items = [("start", *item[1:]) for item in self.items]

    def image(self, length: int) -> None:
        """Add the tokens of one image."""
        self.items.append(("image", length, False))


class Renderer:
    """Turns conversations into ids and labels with one tokenizer and one template.

    Args:
        tokenizer: a fast (``tokenizers``-backed) tokenizer.
        template: a template or its name; ``auto`` as in :func:`template_of`.
        image_token_id: the id that stands for every token of an image; taken from the
            vocabulary's ``<image>`` where not given.

    Raises:
        ValueError: the vocabulary lacks a control token of the template, or the tokenizer is slow.
    """

    def __init__(
        self, tokenizer: Any, template: Template | str = "auto", image_token_id: int | None = None
    ) -> None:
        self.template = (
            template if isinstance(template, Template) else template_of(tokenizer, template)
        )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} has no fast form, which the templates need; "
                "load it from a folder with tokenizer.json"
            )
        vocabulary = tokenizer.get_vocab()
        missing = sorted(token for token in self.template.controls if token not in vocabulary)
        if missing:
            raise ValueError(
                f"template {self.template.name!r} needs the control tokens {', '.join(missing)}, "
                "which the vocabulary of this tokenizer lacks; choose the template that belongs to "
                "the language model"
            )
        self._control_ids = {token: vocabulary[token] for token in self.template.controls}
        begins_with = tokenizer("").input_ids[:1]
        self._bos = tokenizer.bos_token if begins_with == [tokenizer.bos_token_id] else None
        if self._bos is not None:
            self._control_ids.setdefault(self._bos, tokenizer.bos_token_id)
        self.image_token_id = (
            vocabulary.get(IMAGE_MARK) if image_token_id is None else image_token_id
        )
        self._said = PlainText(
            backend, {IMAGE_MARK, *self.template.controls, *tokenizer.all_special_tokens}
        )
        self._vocabulary = backend

    @property
    def end_token_id(self) -> int:
        """Id of the token that ends an answer."""
        mark = self.template.end_mark
        if mark in self._control_ids:
            return self._control_ids[mark]
        return self._said.ids(mark)[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with whatever decides on ids and labels: template, vocabulary, image token."""
        known = f"{self.template!r} {self.image_token_id} {self._bos} {self._vocabulary.to_str()}"
        return hashlib.sha256(known.encode()).hexdigest()

    def render(
        self,
        conversation: Iterable[Turn | Mapping[str, Any]],
        image_lengths: Sequence[int] = (),
    ) -> Rendered:
        """Make ids and labels of a conversation for training.

        Args:
            conversation: see :func:`as_turns`; user and assistant take turns, and the last
                message is an answer.
            image_lengths: number of tokens of each image, in order of appearance.

        Raises:
            ValueError: the order of roles is wrong, there is no answer, or the number of
                ``<image>`` marks differs from the number of images.
        """
        turns = as_turns(conversation)
        if not any(turn.role == "assistant" for turn in turns):
            raise ValueError("the conversation has no answer (no message from 'gpt')")
        return self._encode(self._pieces(turns, image_lengths))

    def prompt(
        self,
        conversation: Iterable[Turn | Mapping[str, Any]],
        image_lengths: Sequence[int] = (),
    ) -> list[int]:
        """Make the ids that an answer is generated from: the last message is a user's."""
        turns = as_turns(conversation)
        if not turns or turns[-1].role != "user":
            raise ValueError("a prompt must end with a message from the user")
        return self._encode(self._pieces(turns, image_lengths)).input_ids

    def _pieces(self, turns: list[Turn], image_lengths: Sequence[int]) -> _Pieces:
        template, pieces, lengths = self.template, _Pieces(), list(image_lengths)
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if marks != len(lengths):
            raise ValueError(
                f"the text has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} but there "
                f"{'is 1 image' if len(lengths) == 1 else f'are {len(lengths)} images'}"
            )
        system = template.default_system
        if turns and turns[0].role == "system":
            system, turns = turns[0].text, turns[1:]
            if not template.system:
                raise ValueError(f"template {template.name!r} has no place for a system message")
        if template.single and len(turns) > 2:
            raise ValueError(
                f"template {template.name!r} takes one question and one answer, got {len(turns)} "
                "messages"
            )
        self._add(pieces, template.start, "")
        pieces.start()
        if system is not None:
            self._add(pieces, template.system, system)
        for number, turn in enumerate(turns):
            wanted = "assistant" if number % 2 else "user"
            if turn.role != wanted:
                raise ValueError(f"message {number} is from {turn.role!r}, expected {wanted!r}")
            if turn.role == "user":
                self._add(pieces, template.user, _image_first(turn.text), lengths)
            else:
                self._add_answer(pieces, turn.text)
        return pieces

    def _add_answer(self, pieces: _Pieces, text: str) -> None:
        parts = self.template.answer
        for number, part in enumerate(parts):
            if isinstance(part, Control):
                pieces.control(part, supervised=True)
            elif isinstance(part, Message):
                pieces.text(self._trimmed(part, text), supervised=True)
            elif text or number:  # what leads to an answer is not written before an empty one
                pieces.text(str(part), supervised=True)
        self._add(pieces, self.template.after_answer, "")

    def _add(
        self,
        pieces: _Pieces,
        parts: Sequence[Part],
        text: str,
        lengths: list[int] | None = None,
    ) -> None:
        """Add unsupervised parts; with ``lengths``, each ``<image>`` in the text takes the next."""
        for part in parts:
            if isinstance(part, Bos):
                if self._bos is not None:
                    pieces.control(self._bos, supervised=False)
            elif isinstance(part, Control):
                pieces.control(part, supervised=False)
            elif not isinstance(part, Message):
                pieces.text(part, supervised=False)
            elif lengths is None:
                pieces.text(self._trimmed(part, text), supervised=False)
            else:
                for number, chunk in enumerate(self._trimmed(part, text).split(IMAGE_MARK)):
                    if number:
                        pieces.image(lengths.pop(0))
                    pieces.text("" if part.images_only else chunk, supervised=False)

    def _trimmed(self, part: Message, text: str) -> str:
        """The text without the white space that the template leaves out.

        Sentencepiece writes a space as U+2581 and takes that sign for a space where text has it.
        """
        return part.trim(text.replace("\u2581", " ") if self._said.dummy_space else text)

    def _encode(self, pieces: _Pieces) -> Rendered:
        ids: list[int] = []
        labels: list[int] = []
        fresh = True  # sentencepiece starts a text, but not what follows a token, with a space
        lead = ""  # the unsupervised text right before
        for kind, value, supervised in pieces.items:
            if kind in ("control", "start"):
                new, fresh = [self._control_ids[str(value)]], fresh and kind == "start"
            elif kind == "image":
                if self.image_token_id is None:
                    raise ValueError(
                        f"the vocabulary has no {IMAGE_MARK} token: add it to the tokenizer, or "
                        "give image_token_id"
                    )
                new, fresh = [self.image_token_id] * int(value), True
            else:
                text = "\u2581" + str(value) if fresh and self._said.dummy_space else str(value)
                new, fresh = self._said.ids(text), False
                if supervised and lead[-1:].isspace() and text[:1].isspace():
                    taken, new = self._joined(lead, text)
                    del ids[len(ids) - taken :], labels[len(labels) - taken :]
            ids += new
            labels += new if supervised else [IGNORE_INDEX] * len(new)
            lead = text if kind == "text" and not supervised else ""
        return Rendered(ids, labels)

    def _joined(self, lead: str, text: str) -> tuple[int, list[int]]:
        """Ids of an answer that begins with white space, after a lead that ends with some.

        Vocabularies may have a token for both together. It holds a part of the answer, so it is
        supervised; the prompt of the same answer still ends with the lead's own token.

        Returns:
            How many of the lead's ids make way, and the ids in their and the answer's place.

        Source: the authors and the models' own chat templates tokenize a message with its header.
            Differs: no.
        """
        alone, both = self._said.ids(lead), self._said.ids(lead + text)
        pairs = enumerate(zip(alone, both, strict=False))
        same = next((n for n, (one, other) in pairs if one != other), len(alone))
        return len(alone) - same, both[same:]


def _image_first(text: str) -> str:
    """Move the only ``<image>`` of a message to its front, as the authors do for every template.

    Source: authors' ``preprocess_multimodal``. Differs: no.
    """
    if text.count(IMAGE_MARK) != 1 or text.startswith(IMAGE_MARK):
        return text
    return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()
