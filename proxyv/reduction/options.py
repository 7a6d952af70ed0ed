"""A method and its options as one argument of a command."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["HELP", "parse_options"]

HELP = "token reduction, as method=fastv,layer=2,ratio=0.5 or as JSON; 'none' for none"


def parse_options(text: str) -> dict[str, Any] | None:
    """Read ``method=fastv,layer=2``, a JSON object, or ``none``.

    A list has to be written as JSON: ``{"method": "pyramiddrop", "layers": [8, 16, 24]}``.

    Returns:
        What ``build_reduction`` takes; None for ``none``.

    Raises:
        ValueError: neither form, with both named.
    """
    text = text.strip()
    if text == "none":
        return None
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"reduction {text!r} is no valid JSON: {error}") from error
    options: dict[str, Any] = {}
    for part in text.split(","):
        key, sign, value = part.partition("=")
        if not sign or not key.strip():
            raise ValueError(
                f"reduction {text!r}: expected key=value with commas between, such as "
                'method=fastv,layer=2, or JSON such as {"method": "fastv", "layer": 2}'
            )
        options[key.strip()] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    """A number, true, false or null as JSON writes them; any other text stays text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
