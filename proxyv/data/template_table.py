"""The table of chat templates: which control tokens and fixed words stand around a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MESSAGE", "TEMPLATES", "Control", "Message", "Part", "Template"]


class Control(str):
    """A piece of a template that is one control token, given by its name in the vocabulary."""


class Message:
    """Stands in a template where the message itself goes."""

    def __repr__(self) -> str:
        return "MESSAGE"


MESSAGE = Message()
Part = str | Control | Message


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
        after_answer: parts between an answer and the next user's message.
    """

    name: str
    start: tuple[Part, ...]
    user: tuple[Part, ...]
    answer: tuple[Part, ...]
    system: tuple[Part, ...] = ()
    default_system: str | None = None
    after_answer: tuple[Part, ...] = ()

    @property
    def controls(self) -> frozenset[str]:
        """Names of every control token that the template uses."""
        parts = (*self.start, *self.system, *self.user, *self.answer, *self.after_answer)
        return frozenset(str(part) for part in parts if isinstance(part, Control))

    @property
    def end_token(self) -> str:
        """The control token that ends an answer (what generation stops at)."""
        ends = [str(part) for part in self.answer if isinstance(part, Control)]
        return ends[-1]

    def chat_template(self) -> str:
        """The same template in Jinja, for ``apply_chat_template`` of a tokenizer or processor."""
        system = ""
        if self.system:
            default = repr(self.default_system or "")
            system = "{% set content = " + default + " %}" + _SYSTEM + _jinja(self.system)
        return (
            _jinja(self.start)
            + system
            + "{% for message in messages %}"
            + _CONTENT
            + "{% if message['role'] == 'user' %}"
            + _jinja(self.user)
            + "{% elif message['role'] == 'assistant' %}"
            + _jinja(self.answer, if_content=True)
            + "{% if not loop.last %}"
            + _jinja(self.after_answer)
            + "{% endif %}{% endif %}{% endfor %}"
        )


_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set content = messages[0]['content'] %}{% endif %}"
)
_CONTENT = (
    "{% set content = message['content'] %}{% if content is not string %}"
    "{% set parts = namespace(text='') %}{% for item in content %}"
    "{% set piece = '<image>\\n' if item['type'] == 'image' else item['text'] %}"
    "{% set parts.text = parts.text + piece %}"
    "{% endfor %}{% set content = parts.text %}{% endif %}"
)


def _jinja(parts: Sequence[Part], if_content: bool = False) -> str:
    """Write template parts as Jinja output; ``if_content`` leaves out words before nothing."""
    words = []
    for part in parts:
        if isinstance(part, Message):
            words.append("{{ content }}")
        elif if_content and not isinstance(part, Control):
            words.append("{{ " + repr(str(part)) + " if content else '' }}")
        else:
            words.append("{{ " + repr(str(part)) + " }}")
    return "".join(words)


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
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
    )
}
