"""Scoring functions of the benchmarks: plain strings in, a number out, no tensors.

A function takes the model's text as it came and strips it once, as the benchmark harness does
before it scores (whole pages are not stripped). Scores lie between 0 and 1. The rules are those
of lmms-eval 0.7.3, oddities included, because published numbers were made with them; each oddity
is named.
"""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

__all__ = [
    "ANLS_THRESHOLD",
    "OCRBENCH_SIZE",
    "RELATIVE_TOLERANCE",
    "anls",
    "box_iou",
    "center_inside",
    "exact_match",
    "final_answer",
    "first_letter_match",
    "mean",
    "mme_perception",
    "ocrbench_match",
    "ocrbench_score",
    "page_bleu",
    "page_edit_distance",
    "read_box",
    "relaxed_accuracy",
    "yes_or_no",
]

ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05
OCRBENCH_SIZE = 1000


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; an empty sequence is an error, never a zero."""
    if not values:
        raise ValueError("the mean of no scores is not defined: no sample was scored")
    return sum(values) / len(values)


_REASONING = [(f"<{tag}>", f"</{tag}>") for tag in ("think", "analysis")]


def final_answer(text: str) -> str:
    """What of a model's text is scored: all but the reasoning that it marks as such.

    Blocks of ``<think>`` and ``<analysis>`` go. Where only the end of a block is there, because
    the prompt has opened it, what follows the last end stays. A block that is never closed stays.

    Source: lmms-eval 0.7.3, its default ``--reasoning_tags``. Differs: no.
    """
    for opening, closing in _REASONING:
        block = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
        while found := block.search(text):
            text = text[: found.start()] + text[found.end() :]
        if opening not in text:
            text = text.rpartition(closing)[2]
    return text.strip()


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


def ocrbench_match(prediction: str, references: Sequence[str], dataset: str) -> float:
    """Whether a reference occurs anywhere in the answer ("no" occurs in "I know").

    Formulas (data set ``HME100k``) are compared without spaces (a tab between characters stays)
    and with case, everything else with full-width characters folded and without case.

    Source: lmms-eval 0.7.3, task ocrbench. Differs: no.
    """
    normalise = _formula if dataset == "HME100k" else _scene_text
    answer = normalise(prediction.strip())
    return float(any(normalise(reference) in answer for reference in references))


def ocrbench_score(scores: Sequence[float]) -> float:
    """Right answers out of 1,000, however many were asked: two right of two are 0.002.

    Source: lmms-eval 0.7.3, metric ocrbench_accuracy. Differs: no.
    """
    return sum(scores) / OCRBENCH_SIZE


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def _scene_text(text: str) -> str:
    return text.translate(_HALF_WIDTH).lower().strip().replace("\n", " ")


def yes_or_no(answer: str) -> str:
    """Read ``yes``, ``no`` or ``other`` from an answer; beyond one word only four characters count.

    Source: lmms-eval 0.7.3, task mme. Differs: no.
    """
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_perception(
    predictions: Sequence[str],
    references: Sequence[str],
    question_ids: Sequence[str],
    categories: Sequence[str],
) -> float:
    """Sum over categories of the mean over images of accuracy plus both-right accuracy, in percent.

    Args:
        predictions: the answers; all four sequences are parallel.
        references: "Yes" or "No".
        question_ids: images; each has exactly two questions in its category.
        categories: the category of each question.

    Returns:
        0 to 200 for each category.

    Raises:
        ValueError: an image has not exactly two questions.
    Source: lmms-eval 0.7.3, metric mme_perception_score. Differs: no.
    """
    images: dict[str, dict[str, list[bool]]] = {}
    for prediction, reference, image, category in zip(
        predictions, references, question_ids, categories, strict=True
    ):
        right = yes_or_no(prediction) == yes_or_no(reference)
        images.setdefault(category, {}).setdefault(image, []).append(right)
    total = 0.0
    for category, pairs in images.items():
        for image, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(
                    f"MME: image {image!r} of {category!r} has {len(pair)} questions, 2 are needed"
                )
        total += mean([100 * mean(pair) + 100 * all(pair) for pair in pairs.values()])
    return total


def first_letter_match(prediction: str, reference: str) -> float:
    """Whether the first character is the letter asked for; "apple" counts as A, "(A)" does not.

    White space around the reference does not count.

    Source: lmms-eval 0.7.3, task seedbench. Differs: no.
    """
    return float(prediction.strip()[:1].lower() == reference.strip().lower())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, reference: str) -> float:
    """Equality without case and ASCII punctuation, which is deleted and not spaced.

    Lower-casing never makes a text longer: ``İ``, of which two characters would come, is ``i``.

    Source: lmms-eval 0.7.3, task gqa, which lower-cases arrays of fixed width. Differs: no.
    """
    sides = [
        text.lower()[: len(text)].translate(_NO_PUNCTUATION)
        for text in (prediction.strip(), reference)
    ]
    return float(sides[0] == sides[1])


Box = tuple[float, float, float, float]
_BOX = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


def read_box(answer: str) -> Box:
    """The first ``[x1, y1, x2, y2]`` in an answer; all zeros where there is none.

    Source: lmms-eval 0.7.3, task refcoco_bbox_rec. Differs: no.
    """
    found = _BOX.search(answer)
    if found is None:
        return (0.0, 0.0, 0.0, 0.0)
    left, top, right, bottom = map(float, found.groups())
    return (left, top, right, bottom)


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes ``x1, y1, x2, y2``.

    Source: lmms-eval 0.7.3, task refcoco_bbox_rec. Differs: 0 instead of a division by zero where
    the signed area of a flipped box cancels the other one's.
    """
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


def center_inside(predicted: Box, truth: Box) -> float:
    """Whether the centre of the predicted box lies in the true one, edges included."""
    x, y = (predicted[0] + predicted[2]) / 2, (predicted[1] + predicted[3]) / 2
    return float(truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3])


def page_edit_distance(prediction: str, reference: str) -> float:
    """Edit distance of two pages over the longer one's length: 0 is equal, 1 is all different.

    Every character counts, white space at the ends included.

    Source: lmms-eval 0.7.3, ocrbench_v2 page metric. Differs: two empty pages have distance 0.
    """
    longest = max(len(prediction), len(reference))
    return Levenshtein.distance(prediction, reference) / longest if longest else 0.0


def page_bleu(prediction: str, reference: str) -> float:
    """Sentence BLEU-4 of words, with case and without smoothing.

    Words are what white space separates. Where one side has a Chinese character, jieba finds the
    words of both, and white space and punctuation are words as well.

    Raises:
        ValueError: jieba is needed and not installed.
    Source: lmms-eval 0.7.3, ocrbench_v2 page metric. Differs: no.
    """
    from nltk.translate import bleu

    chinese = _CHINESE.search(prediction) or _CHINESE.search(reference)
    words = _chinese_words if chinese else str.split
    with warnings.catch_warnings():  # no common 4-gram: nltk explains that the score is near 0
        warnings.simplefilter("ignore", UserWarning)
        return float(bleu([words(reference)], words(prediction)))


_CHINESE = re.compile("[\u4e00-\u9fa5]")


def _chinese_words(text: str) -> list[str]:
    try:
        import jieba
    except ImportError as error:
        raise ValueError(
            "a page with Chinese text is scored by words, which the package jieba finds, and it is "
            "not installed: pip install jieba"
        ) from error
    jieba.setLogLevel(logging.WARNING)  # else it tells on stderr how it loads its dictionary
    return jieba.lcut(text)
