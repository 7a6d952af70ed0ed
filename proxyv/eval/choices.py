"""Which option of a multiple-choice question an answer means, and accuracy over rotations.

The rules are those of lmms-eval 0.7.3, task mmbench_en_dev_static, oddities included: they ask no
other model, so the same answer always gets the same score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ROTATION", "chosen_option", "circular_hits", "inferred_option"]

LETTERS = "ABCDE"
ROTATION = 1_000_000  # rotations of question n have the numbers n + 1,000,000, n + 2,000,000, ...

_AFFIXES = [("", mark) for mark in (".", ",", ":", ")", ").")]
_AFFIXES += [("(", ")"), ("(", ").")]
_AFFIXES += [(":", mark) for mark in ("", ",", ".", ")", ").")]

_PHRASES = [
    opening + phrase
    for phrase, openings in {
        "answer is": ("", "the ", "correct ", "the correct ", "best ", "the best ", "my "),
        "option is": ("correct ", "the correct ", "best ", "the best "),
        "choice is": ("", "the ", "correct ", "the correct ", "my "),
    }.items()
    for opening in openings
]
_PHRASES += ["i choose", "i select", "i pick"]
_PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter an answer means: by the strict rules, else by the loose ones, else None.

    Args:
        answer: the model's text.
        options: option texts by letter; a missing option may be the text ``nan``.

    Source: lmms-eval 0.7.3, mmbench_en_dev_static. Differs: no.
    """
    return inferred_option(answer, options) or _loose_option(answer.strip(), sorted(options))


def inferred_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that stands alone in the answer, or that of the only option it contains.

    Only capital letters count, E among them even where there is no option E. A single "A" in an
    answer of more than three words may be an article and is passed over. The option texts are
    then looked for without case and anywhere, so "nan" is found in "banana", and "cat food"
    contains both "cat" and "cat food", which decides nothing.

    Source: lmms-eval 0.7.3, MMBench_Evaluator.can_infer. Differs: no.
    """
    answer = answer.strip()
    if "Failed to obtain answer via API" not in answer:
        words = answer.split()
        alone = [letter for letter in LETTERS if letter in words]
        if len(alone) == 1 and not ("A" in words and len(words) > 3):
            return alone[0]
        for before, after in _AFFIXES:
            marked = [letter for letter in LETTERS if before + letter + after in words]
            if len(marked) == 1:
                return marked[0]
    lowered = answer.lower()
    contained = [letter for letter, text in options.items() if str(text).lower() in lowered]
    return contained[0] if len(contained) == 1 else None


def _loose_option(answer: str, letters: Sequence[str]) -> str | None:
    """The best sign of any letter: at an end of the text, after a phrase, before a mark, or at all.

    Of signs of the same kind the last one counts.
    """
    for mark in ",.!?;:'\"":
        answer = answer.strip(mark)
    padded, core = f" {answer} ", answer.strip()
    found: list[tuple[int, int, str]] = []  # (strength, place, letter)
    for letter in letters:
        if core.startswith(letter) and not core[1:2].isalpha():
            found.append((10, 0, letter))
        if core.endswith(letter) and not core[-2:-1].isalpha():
            found.append((9, len(padded), letter))
        for phrase in _PHRASES:
            start = padded.lower().find(phrase)
            place = padded.find(letter, start + len(phrase)) if start >= 0 else -1
            if place >= 0:
                found.append((7, place, letter))
        signs = {6: f"({letter})", 5: f"{letter}.", 4: f"{letter}:", 3: f"{letter})"}
        for strength, sign in {**signs, 2: f"{letter} "}.items():
            if sign in padded:
                found.append((strength, padded.rfind(sign), letter))
    if not found:
        found = [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(found)[2] if found else None


def circular_hits(right: Sequence[bool], indices: Sequence[int]) -> dict[int, bool]:
    """Which questions are right in every rotation of their options that is there.

    Args:
        right: whether each row was answered correctly.
        indices: the number of each row; the rows below `ROTATION` are the questions, the others
            their rotations. A rotation whose question is absent counts for nothing.

    Returns:
        For each question whether all of its rows are right.
    Source: lmms-eval 0.7.3, MMBench_Evaluator.eval_result. Differs: no.
    """
    hits = {index: True for index in indices if index < ROTATION}
    for good, index in zip(right, indices, strict=True):
        if index % ROTATION in hits and not good:
            hits[index % ROTATION] = False
    return hits
