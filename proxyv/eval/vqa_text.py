"""VQA soft accuracy: an answer is right as far as people gave the same one.

Both sides are normalised by the rules of the VQA evaluation server before they are compared. The
rules are those of lmms-eval 0.7.3, oddities included, because published numbers were made with
them; each oddity is named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from proxyv.eval.metrics import mean

__all__ = ["normalise_vqa", "vqa_accuracy"]

AGREEING = 3  # so many people with the same answer make it fully right
MAX_PERIODS = 32

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}

# Every form is restored from the spellings that lack exactly one of its apostrophes.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _spellings() -> dict[str, str]:
    restored = {
        form[:place] + form[place + 1 :]: form
        for form in _CONTRACTED
        for place, letter in enumerate(form)
        if letter == "'"
    }
    return restored | {"somebody'd": "somebodyd"}  # the one that the server has backwards


_RESTORED = _spellings()


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Share of the other people that agree, where three others are enough for a full score.

    Each reference is left out in turn, and the answer is compared with the rest: with ten
    references one match gives 0.3, two 0.6, three 0.9, four or more 1. A single reference can
    never be matched.

    Args:
        prediction: the model's text.
        references: what people answered, ten in the real data, at least one.

    Returns:
        A score between 0 and 1.

    Raises:
        ValueError: there is no reference.
    Source: lmms-eval 0.7.3, task textvqa_val. Differs: no.
    """
    if not references:
        raise ValueError("VQA accuracy needs at least one reference answer, got none")
    answer = normalise_vqa(prediction)
    same = [normalise_vqa(reference) == answer for reference in references]
    return mean([min(1.0, (sum(same) - own) / AGREEING) for own in same])


def normalise_vqa(text: str) -> str:
    """Bring an answer to the form in which the VQA evaluation server compares answers.

    Commas and question marks go, ``'s`` becomes a word; other punctuation is deleted where it
    stands next to a space anywhere in the text, and is a space otherwise; the first 32 periods
    that no digit follows go; number words up to ten become digits, articles go, and contractions
    get their apostrophe back. ``$ % & : ' # *`` stay.

    Source: lmms-eval 0.7.3, EvalAIAnswerProcessor. Differs: its capitalised contractions, which
    can match nothing in lower-cased text, are left out.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        loose = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if loose else " ")
    # The server passes a regular-expression flag, 32, where the number of replacements belongs.
    plain = _PERIOD.sub("", spaced, count=MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
