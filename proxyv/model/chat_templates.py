"""The table of chat templates: which control tokens and fixed words stand around a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AddedToken

__all__ = [
    "BOS",
    "IMAGES",
    "IMAGE_MARK",
    "MESSAGE",
    "TEMPLATES",
    "Bos",
    "Control",
    "Message",
    "Part",
    "Template",
    "add_image_token",
]


IMAGE_MARK = "<image>"
"""What stands for an image in the text of a message."""


class Control(str):
    """A piece of a template that is one control token, given by its name in the vocabulary."""


class Bos:
    """Stands in a template for the token that the tokenizer itself begins a text with, if any."""


@dataclass(frozen=True)
class Message:
    """Stands in a template where the message itself goes.

    Attributes:
        strip: which white space around the message is left out: none, ``left`` or ``both``.
        images_only: whether only the images of the message stay, without its words.
    """

    strip: str = ""
    images_only: bool = False

    def trim(self, text: str) -> str:
        """The text without the white space that is left out."""
        return {"": text, "left": text.lstrip(), "both": text.strip()}[self.strip]


BOS = Bos()
MESSAGE = Message()
IMAGES = Message(images_only=True)
Part = str | Control | Message | Bos


@dataclass(frozen=True)
class Template:
    """What stands around the messages of a conversation.

    Attributes:
        name: the key in :data:`TEMPLATES`.
        start: parts before everything else.
        system: parts around the system message; empty where there is no place for one.
        default_system: the system message of a conversation that brings none.
        user: parts around a user's message, up to the place where an answer begins.
        answer: parts around an answer, its end token included: all of it is supervised.
        after_answer: parts behind an answer that are not supervised.
        single: whether a conversation is one question and one answer.
    """

    name: str
    start: tuple[Part, ...]
    user: tuple[Part, ...]
    answer: tuple[Part, ...]
    system: tuple[Part, ...] = ()
    default_system: str | None = None
    after_answer: tuple[Part, ...] = ()
    single: bool = False

    @property
    def controls(self) -> frozenset[str]:
        """Names of every control token that the template uses."""
        parts = (*self.start, *self.system, *self.user, *self.answer, *self.after_answer)
        return frozenset(str(part) for part in parts if isinstance(part, Control))

    @property
    def end_mark(self) -> str:
        """What ends an answer, and what generation stops at: a control token, or plain text."""
        return str(self.answer[-1])

    def chat_template(self) -> str:
        """The same template in Jinja, for ``apply_chat_template`` of a tokenizer or processor.

        Where words come right after the beginning, a space stands before them: it is what a
        sentencepiece tokenizer puts there by itself, but not behind a control token in a text.
        """
        refusal = repr(f"template {self.name!r} has no place for a system message")
        system = "{{ raise_exception(" + refusal + ") }}"
        if self.system:
            default = repr(self.default_system or "")
            system = "{% set content = " + default + " %}" + _SYSTEM + _jinja(self.system)
        if self.default_system is None:
            system = "{% if messages[0]['role'] == 'system' %}" + system + "{% endif %}"
        first = next(iter((*self.start[1:], *self.system, *self.user)))
        begin = _jinja(self.start)
        if self.start and not isinstance(first, Control) and first is not IMAGES:
            begin += " "
        return (
            begin
            + system
            + "{% for message in messages %}"
            + _CONTENT
            + "{% if message['role'] == 'user' %}"
            + _jinja(self.user)
            + "{% elif message['role'] == 'assistant' %}"
            + _jinja(self.answer, if_content=True)
            + _jinja(self.after_answer)
            + "{% endif %}{% endfor %}"
        )


_JOINED = (  # content that comes in parts, as one text
    "{% if content is not string %}"
    "{% set parts = namespace(text='') %}{% for item in content %}"
    "{% set media = item['type'] in ('image', 'video') %}"
    "{% set piece = '<' ~ item['type'] ~ '>\\n' if media else item['text'] %}"
    "{% set parts.text = parts.text + piece %}"
    "{% endfor %}{% set content = parts.text %}{% endif %}"
)
_CONTENT = "{% set content = message['content'] %}" + _JOINED
_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set content = messages[0]['content'] %}"
    + _JOINED
    + "{% endif %}"
)


def _jinja(parts: Sequence[Part], if_content: bool = False) -> str:
    """Write template parts as Jinja output; ``if_content`` leaves out words before nothing."""
    words = []
    for number, part in enumerate(parts):
        if isinstance(part, Bos):
            words.append("{{ bos_token or '' }}")
        elif isinstance(part, Message) and part.images_only:
            words.append("{{ '<image>' * (content.split('<image>') | length - 1) }}")
        elif isinstance(part, Message):
            words.append("{{ content" + _JINJA_STRIP[part.strip] + " }}")
        elif if_content and not isinstance(part, Control) and number == 0:
            words.append("{{ " + repr(str(part)) + " if content else '' }}")
        else:
            words.append("{{ " + repr(str(part)) + " }}")
    return "".join(words)


_JINJA_STRIP = {"": "", "left": ".lstrip()", "both": ".strip()"}


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_TRIMMED = Message(strip="both")
_LEFT_TRIMMED = Message(strip="left")


def _llama3(role: str) -> tuple[Part, ...]:
    """Header of a message in Llama 3's form."""
    return (Control("<|start_header_id|>"), role, Control("<|end_header_id|>"), "\n\n")


def _chatml(name: str, default_system: str | None = None, start: tuple[Part, ...] = ()) -> Template:
    """A template of the ChatML form, with its newline after every end token."""
    begin, end = Control("<|im_start|>"), Control("<|im_end|>")
    return Template(
        name=name,
        start=start,
        system=(begin, "system\n", MESSAGE, end, "\n"),
        default_system=default_system,
        user=(begin, "user\n", MESSAGE, end, "\n", begin, "assistant\n"),
        answer=(MESSAGE, end),
        after_answer=("\n",),
    )


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="tiny",
            start=(Control("<s>"),),
            user=(Control("<|user|>"), MESSAGE, Control("<|assistant|>")),
            answer=(MESSAGE, Control("</s>")),
        ),
        Template(
            name="v1",
            start=(Control("<s>"),),
            system=(MESSAGE, " "),
            default_system=_VICUNA_SYSTEM,
            user=("USER: ", MESSAGE, " ASSISTANT:"),
            answer=(" ", MESSAGE, Control("</s>")),
        ),
        Template(
            name="llama3",
            start=(Control("<|begin_of_text|>"),),
            system=(*_llama3("system"), _TRIMMED, Control("<|eot_id|>")),
            default_system=_LLAMA3_SYSTEM,
            user=(*_llama3("user"), _TRIMMED, Control("<|eot_id|>"), *_llama3("assistant")),
            answer=(_TRIMMED, Control("<|eot_id|>")),
        ),
        _chatml("qwen", "You are a helpful assistant."),
        Template(  # the newlines of Phi-3's own template vanish: its control tokens swallow them
            name="phi3",
            start=(),
            system=(Control("<|system|>"), _LEFT_TRIMMED, Control("<|end|>")),
            default_system="You are a helpful AI assistant.",
            user=(
                Control("<|user|>"),
                _LEFT_TRIMMED,
                Control("<|end|>"),
                Control("<|assistant|>"),
            ),
            answer=(_LEFT_TRIMMED, Control("<|end|>")),
        ),
        _chatml("internlm2", start=(Control("<s>"),)),
        _chatml("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        Template(  # captions for a first alignment: the question is not shown
            name="plain", start=(BOS,), user=(IMAGES,), answer=(MESSAGE, "\n"), single=True
        ),
    )
}


def add_image_token(tokenizer: Any) -> None:
    """Give ``<image>`` the next free id of a tokenizer that does not know it."""
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)])
