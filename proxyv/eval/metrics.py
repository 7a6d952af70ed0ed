"""Scoring functions of the benchmarks: plain strings in, a number out, no tensors.

Every function takes the model's text as it came, strips it once (as the benchmark harness does
before it scores) and returns a score between 0 and 1. The rules are those of lmms-eval 0.7.3,
oddities included, because published numbers were made with them; each oddity is named.
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

__all__ = ["ANLS_THRESHOLD", "RELATIVE_TOLERANCE", "anls", "mean", "relaxed_accuracy"]

ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; an empty sequence is an error, never a zero."""
    if not values:
        raise ValueError("the mean of no scores is not defined: no sample was scored")
    return sum(values) / len(values)


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question.

    The distance is taken on lower-cased text with white space collapsed, but divided by the
    length of the *uncollapsed* upper-cased text (so ``ß`` counts twice). Similarities below 0.5
    become 0; exactly 0.5 is kept. Nothing else is normalised: articles, punctuation and Unicode
    forms count.

    Args:
        prediction: the model's text.
        references: accepted answers, at least one.

    Returns:
        The similarity to the closest reference, 0 or in [0.5, 1].

    Raises:
        ValueError: there is no reference.
    Source: lmms-eval 0.7.3, task docvqa_val. Differs: no; the published formula also drops a
    similarity of exactly 0.5.
    """
    if not references:
        raise ValueError("ANLS needs at least one reference answer, got none")
    prediction = prediction.strip()
    distances = []
    for reference in references:
        distance = Levenshtein.distance(_collapsed(reference), _collapsed(prediction))
        length = max(len(reference.upper()), len(prediction.upper()))
        distances.append(distance / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed_accuracy(prediction: str, reference: str) -> float:
    """Whether an answer about a chart is right: a number within 5 %, other text exactly.

    Numbers are what Python's ``float`` reads, with a trailing ``%`` taken as a division by 100:
    ``1,000`` and ``$5`` are text, ``1_000`` is a number, and so is a year. A reference of 0 has no
    relative distance and is compared as text; ``nan`` and ``inf`` match nothing. Text is compared
    without case, and the reference is not stripped.

    Args:
        prediction: the model's text.
        reference: the accepted answer.

    Returns:
        1.0 or 0.0.
    Source: lmms-eval 0.7.3, task chartqa. Differs: no.
    """
    prediction = prediction.strip()
    predicted, expected = _number(prediction), _number(reference)
    if predicted is not None and expected:
        close = abs(predicted - expected) / abs(expected) <= RELATIVE_TOLERANCE
        return float(close)
    return float(prediction.lower() == reference.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
