"""What commands share: one-line errors with an exit code, nearest names, options of a model."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "CommandError",
    "add_model_options",
    "message_console",
    "model_options",
    "nearest",
    "place",
    "require_one_of",
    "run_command",
    "table_console",
]


class CommandError(ValueError):
    """A mistake of the user's that one line can explain; commands print it and exit with 2."""


def nearest(what: str, name: str, allowed: Iterable[str]) -> str:
    """Say that a name is unknown, and which known one was probably meant.

    Args:
        what: what the name stands for, such as "task".
        name: the name that was given.
        allowed: every name that exists.

    Returns:
        One line such as ``unknown task 'docvq': did you mean 'docvqa'? (one of chartqa, docvqa)``.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f": did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}{hint} (one of {', '.join(names)})"


def place(path: str | os.PathLike[str]) -> str:
    """A path for an error: a relative one with the folder it starts from.

    Most paths of configs and commands start where the command runs, so that one which is right may
    be missing because the command runs elsewhere.
    """
    name = os.fspath(path)
    return repr(name) if os.path.isabs(name) else f"{name!r} (in {os.getcwd()})"


def require_one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that an option does not take.

    Raises:
        ValueError: the value is not in ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{option}={value!r} is not known: use one of {', '.join(allowed)}")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a command loads a model that is to answer; ``model_options`` reads what was given."""
    add = parser.add_argument
    add("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, else float32)")
    add("--attn", default="sdpa", help="sdpa or eager (default: sdpa)")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, if any)")
    add("--template", default="auto", help="chat template (default: the one saved with the model)")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of ``proxyv.eval.answerer.Answerer.load``."""
    return {
        "dtype": args.dtype,
        "attention": args.attn,
        "device": args.device,
        "template": args.template,
    }


def run_command(
    main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> int:
    """Run a command; a user's mistake becomes one line on stderr and exit code 2.

    Only ``ValueError`` (bad values, configs and data) and ``OSError`` (files) are taken for
    mistakes of the user; anything else is a defect and keeps its traceback. Set
    ``PROXYV_TRACEBACK=1`` to see every traceback.
    """
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        if os.environ.get("PROXYV_TRACEBACK") == "1":
            raise
        text = " ".join(_text(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _text(error: ValueError | OSError) -> str:
    """What an error says; the operating system's own ones without their number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def message_console() -> Console:
    """A console on stderr for one-line messages, whose text stays as it is."""
    from rich.console import Console  # not needed to load a model

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def table_console(**options: Any) -> Console:
    """A console that shows every column: a narrow terminal wraps lines, and no number is cut."""
    from rich.console import Console  # not needed to load a model

    return Console(width=max(Console().width, 160), **options)
