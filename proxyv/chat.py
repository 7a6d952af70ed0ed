"""Ask a model about an image: ``python -m proxyv.chat --model DIR --image FILE --question TEXT``.

Without ``--question`` it reads questions line by line, until the end of the input (Ctrl-D). The
conversation goes on: earlier questions and answers are part of the next one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from proxyv.cli import CommandError, add_model_options, model_options, run_command

__all__ = ["main", "talk"]

MAX_NEW_TOKENS = 256

Reply = Callable[[list[dict[str, str]]], str]


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.chat", description="Ask a model about one or more images."
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder, or hub id")
    add("--image", required=True, action="append", type=Path, help="image file; may be repeated")
    add("--question", help="ask this and end (default: read questions, Ctrl-D ends)")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer, in tokens")
    add_model_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if args.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens {args.max_new_tokens}: a number from 1 on is needed")
    images = [_open(path) for path in args.image]
    if args.question is not None and not args.question.strip():
        raise CommandError("--question is empty: write a question, or leave it out for a prompt")
    from proxyv.eval.answerer import Answerer

    answerer = Answerer.load(args.model, **model_options(args))

    def reply(conversation: list[dict[str, str]]) -> str:
        return answerer.reply([conversation], [images], args.max_new_tokens)[0]

    questions: Iterable[str] = [args.question]
    if args.question is None:
        if sys.stdin.isatty():
            print("Ask about the image; Ctrl-D ends.")
        questions = iter(_read_question, None)
    talk(reply, len(images), questions, print)
    return 0


def talk(
    reply: Reply, num_images: int, questions: Iterable[str], show: Callable[[str], object]
) -> None:
    """Hold a conversation whose first message brings the images; empty questions are skipped."""
    from proxyv.eval.answerer import user_message

    conversation: list[dict[str, str]] = []
    for question in questions:
        if not question.strip():
            continue
        brought = 0 if conversation else num_images
        conversation.append(user_message(question.strip(), brought))
        answer = reply(conversation)
        conversation.append({"role": "assistant", "content": answer})
        show(answer)


def _read_question() -> str | None:
    """The next line; None at the end of the input. Only a person at a terminal sees a prompt."""
    person = sys.stdin.isatty()
    try:
        return input("> " if person else "")
    except EOFError:
        if person:
            print()
        return None


def _open(path: Path) -> Image.Image:
    from proxyv.data.images import DataError, image_of_bytes

    if not path.is_file():
        raise CommandError(f"--image {path}: {'a folder' if path.is_dir() else 'no such file'}")
    try:
        return image_of_bytes(path.read_bytes(), f"--image {path}").load()
    except DataError as error:
        raise CommandError(str(error)) from error


if __name__ == "__main__":
    sys.exit(run_command(main))
