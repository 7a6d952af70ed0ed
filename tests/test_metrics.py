"""Scores of the benchmarks, against strings worked by hand and against reference outputs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from golden import golden_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.eval.choices import chosen_option, circular_hits, inferred_option
from proxyv.eval.metrics import (
    Box,
    anls,
    box_iou,
    center_inside,
    exact_match,
    final_answer,
    first_letter_match,
    mean,
    mme_perception,
    ocrbench_match,
    ocrbench_score,
    page_bleu,
    page_edit_distance,
    read_box,
    relaxed_accuracy,
    yes_or_no,
)
from proxyv.eval.statistics import bootstrap_interval
from proxyv.eval.vqa_text import normalise_vqa, vqa_accuracy

TEXT = st.text(max_size=12)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Hello World", ["hello world"], 1.0),
        ("hello\nworld", ["hello  world"], 1.0),
        ("  12 May 1975 ", ["12 May 1975"], 1.0),
        ("1234", ["1,234", "1234"], 1.0),
        ("answer.", ["answer"], 1 - 1 / 7),
        ("The Times", ["Times"], 1 - 4 / 9),
        ("", ["hello"], 0.0),
        ("", [""], 1.0),
        ("abc", [""], 0.0),
    ],
)
def test_anls_by_hand(prediction: str, references: list[str], score: float) -> None:
    assert anls(prediction, references) == pytest.approx(score, abs=1e-12)


def test_anls_keeps_exactly_one_half_and_drops_less() -> None:
    assert anls("ab", ["ax"]) == 0.5
    assert anls("abcdefghijk", ["abcdefXXXXX"]) == pytest.approx(6 / 11)
    assert anls("abcdefghijk", ["abcdeXXXXXX"]) == 0.0


def test_anls_divides_by_the_raw_length_of_the_reference() -> None:
    assert anls("axx", ["ab      "]) == 0.75  # collapsed it would be 1/3, that is 0


def test_anls_counts_the_upper_case_length_of_sharp_s() -> None:
    assert anls("ß", ["s"]) == 0.5


def test_anls_does_not_unify_unicode_forms() -> None:
    assert anls("\u00e9", ["e\u0301"]) == 0.0


def test_anls_takes_the_best_reference_not_any_hit() -> None:
    # An early release of the harness gave 1.0 as soon as any reference scored above 0.
    assert anls("abcd", ["abcx", "zzzz"]) == 0.75


def test_anls_without_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        anls("a", [])


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_anls_range_and_order_of_references(prediction: str, references: list[str]) -> None:
    score = anls(prediction, references)
    assert score == 0.0 or 0.5 <= score <= 1.0
    assert score == anls(prediction, references[::-1])
    assert score == max(anls(prediction, [reference]) for reference in references)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("14", "14", 1),
        ("105", "100", 1),
        ("94.99", "100", 0),
        ("-4.75", "-5", 1),
        ("5", "-5", 0),
        ("Blue", "blue", 1),
        ("the blue line", "blue line", 0),
        (" 14\n", "14 ", 1),
        ("", "14", 0),
    ],
)
def test_relaxed_accuracy_by_hand(prediction: str, reference: str, score: float) -> None:
    assert relaxed_accuracy(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("5%", "0.05", 1), ("0.05", "5%", 1), ("5%", "5", 0), ("2%", "2", 0), ("5%", "5%", 1)],
)
def test_relaxed_accuracy_percent_is_a_hundredth(
    prediction: str, reference: str, score: float
) -> None:
    assert relaxed_accuracy(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("1,000", "1000", 0), ("1_000", "1000", 1), ("$5", "5", 0), ("Yes.", "Yes", 0)],
)
def test_relaxed_accuracy_reads_numbers_as_python_does(
    prediction: str, reference: str, score: float
) -> None:
    assert relaxed_accuracy(prediction, reference) == score


def test_relaxed_accuracy_zero_needs_the_same_text() -> None:
    assert relaxed_accuracy("0", "0") == 1
    assert relaxed_accuracy("0.0", "0") == 0
    assert relaxed_accuracy("0", "0%") == 0


def test_relaxed_accuracy_floating_point_at_the_edge() -> None:
    assert relaxed_accuracy("1.05", "1") == 0  # 0.05000000000000004
    assert relaxed_accuracy("2.1", "2") == 0
    assert relaxed_accuracy("10.5", "10") == 1


def test_relaxed_accuracy_years_are_numbers() -> None:
    assert relaxed_accuracy("2008", "2010") == 1
    assert relaxed_accuracy("2010.", "2010") == 1


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_relaxed_accuracy_nan_and_inf_match_nothing(text: str) -> None:
    assert relaxed_accuracy(text, text) == 0


def test_relaxed_accuracy_reads_other_digits() -> None:
    assert relaxed_accuracy("１２", "12") == 1


def test_relaxed_accuracy_does_not_strip_a_text_reference() -> None:
    assert relaxed_accuracy("blue", "blue ") == 0


def test_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sample was scored"):
        mean([])


def test_boxes_by_hand() -> None:
    assert box_iou((0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)) == 0.5
    assert box_iou((0.1, 0.1, 0.3, 0.3), (0.3, 0.1, 0.1, 0.3)) == 0.0  # areas cancel
    assert read_box("at [0.1, 0.2,0.3,  0.4]") == (0.1, 0.2, 0.3, 0.4)
    assert read_box("[.1, .2, .3, .4]") == read_box("nowhere") == (0.0, 0.0, 0.0, 0.0)


def test_the_centre_of_a_box_by_hand() -> None:
    assert center_inside((0.0, 0.4, 0.2, 0.6), (0.05, 0.45, 0.15, 0.55)) == 1  # of (0.1, 0.5)
    assert center_inside((0.0, 0.4, 0.2, 0.6), (0.45, 0.05, 0.55, 0.15)) == 0
    for corner in ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)):  # edges are inside
        assert center_inside((0.0, 0.0, 1.0, 1.0), corner) == 1


def test_mme_needs_pairs() -> None:
    assert mme_perception(["yes", "yes"], ["Yes", "No"], ["1", "1"], ["OCR", "OCR"]) == 50
    with pytest.raises(ValueError, match="image '1' of 'OCR' has 1 questions, 2 are needed"):
        mme_perception(["yes"], ["Yes"], ["1"], ["OCR"])


def test_pages_by_hand() -> None:
    assert page_edit_distance("abcd", "abxd") == 0.25
    assert page_edit_distance("", "") == 0.0
    assert page_edit_distance("a", "abcd") == page_edit_distance("abcd", "a") == 0.75
    # Every 4-gram of the prediction is in the page, and it is short: exp(1 - 8 / 4).
    assert page_bleu("a b c d", "a b c d e f g h") == pytest.approx(math.exp(-1))
    assert page_bleu("a b c d e", "a b c d e") == 1.0
    assert page_bleu("a b c d", "w x y z") < 1e-6


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a\nb</think> Yes ", "Yes"),
        ("A<think>x</think>B<think>y</think>C<analysis>z</analysis>", "ABC"),
        ("the prompt has opened it</think> 14", "14"),
        ("<think>never closed", "<think>never closed"),
        ("<THINK>x</THINK>y", "<THINK>x</THINK>y"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("</think>x<think>y", "</think>x<think>y"),
        ("plain", "plain"),
    ],
)
def test_marked_reasoning_is_not_scored(text: str, answer: str) -> None:
    assert final_answer(text) == answer


# ---- VQA soft accuracy


@pytest.mark.parametrize(
    ("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_leaves_each_reference_out_in_turn(matches: int, score: float) -> None:
    references = ["nokia"] * matches + ["samsung"] * (10 - matches)
    assert vqa_accuracy("Nokia.", references) == pytest.approx(score, abs=1e-12)


def test_vqa_accuracy_of_a_single_reference_is_zero() -> None:
    assert vqa_accuracy("nokia", ["nokia"]) == 0.0
    with pytest.raises(ValueError, match="at least one reference"):
        vqa_accuracy("nokia", [])


def test_vqa_text_removes_only_the_first_32_periods() -> None:
    assert normalise_vqa("b." * 40) == "b" * 33 + ".b" * 7 + "."


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("t-shirt", "t shirt"),  # a hyphen is a space
        ("coca - cola", "coca cola"),  # beside a space it is deleted
        ("a-b c- d", "ab c d"),  # and then everywhere in the text
        ("a-b c -d", "ab c d"),
        ("$1,000", "$1000"),
        ("3.5", "3.5"),
        ("The Red Car", "red car"),
        ("eleven", "eleven"),
        ("none", "0"),
        ("Ten", "10"),
        ("dont", "don't"),
        ("wouldnt've", "wouldn't've"),
        ("Im", "im"),  # contractions with capitals never match
        ("it's", "it 's"),
        ("rock & roll #1: 5% *", "rock & roll #1: 5% *"),
        ("two\nlines", "2 lines"),
        ("!hello", "hello"),
    ],
)
def test_vqa_text_by_hand(text: str, normalised: str) -> None:
    assert normalise_vqa(text) == normalised


# ---- MMBench

ANIMALS = {"A": "cat", "B": "dog", "C": "bird", "D": "fish"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A dog is here now", "B"),  # more than three words: "A" may be an article
        ("A dog", "A"),
        ("A dog here", "A"),
        ("E", "E"),  # inferred although there is no option E
        ("a", None),
        ("(C).", "C"),
        ("A B", None),
        ("spider", None),
    ],
)
def test_option_letters_stand_alone(answer: str, letter: str | None) -> None:
    assert inferred_option(answer, ANIMALS) == letter


def test_missing_options_are_the_text_nan_and_match_inside_words() -> None:
    options = {"A": "banana split", "B": "apple", "C": "nan", "D": "nan"}
    assert inferred_option("an apple", options) == "B"
    assert inferred_option("banana and apple", options) is None
    assert inferred_option("banana", {"A": "pear", "B": "apple", "C": "nan"}) == "C"


def test_an_option_inside_another_option_decides_nothing() -> None:
    options = {"A": "cat", "B": "cat food", "C": "dog", "D": "fish"}
    assert inferred_option("cat food", options) is None
    assert inferred_option("cat", options) == "A"


def test_the_loose_rules_are_asked_only_when_the_strict_ones_fail() -> None:
    assert inferred_option("Answer:D", ANIMALS) is None
    assert chosen_option("Answer:D", ANIMALS) == "D"
    assert chosen_option("Well, B: or C: but the answer is D/x", ANIMALS) == "D"
    assert chosen_option("[B] it is", ANIMALS) == "B"
    assert chosen_option("(A)/(B)/(A)!", ANIMALS) == "A"  # the last sign
    assert chosen_option("[(B)] of the USA", ANIMALS) == "B"  # a word that ends with an A
    assert chosen_option("nothing", ANIMALS) is None


def test_a_question_counts_only_if_all_its_rotations_are_right() -> None:
    indices = [1, 2, 1000001, 1000002, 3000009]
    assert circular_hits([True, True, True, False, True], indices) == {1: True, 2: False}


# ---- others


def test_ocrbench_divides_by_a_thousand_whatever_the_number_of_rows() -> None:
    assert ocrbench_score([1.0, 1.0]) == 0.002


def test_ocrbench_matches_inside_words_and_formulas_with_case() -> None:
    assert ocrbench_match("I know", ["no"], "SVT") == 1
    assert ocrbench_match("anything", [""], "SVT") == 1
    assert ocrbench_match("ＡＢＣ", ["abc"], "SVT") == 1
    assert ocrbench_match("\\Frac { A }", ["\\frac{A}"], "HME100k") == 0
    assert ocrbench_match("x ^ 2\n= A", ["x^2=A"], "HME100k") == 1
    assert ocrbench_match("x^2", ["\t x^2\t"], "HME100k") == 1
    assert ocrbench_match("x^2", ["x\t^2"], "HME100k") == 0  # within, only spaces go


@pytest.mark.parametrize(
    ("answer", "word"),
    [("not sure", "no"), ("know", "no"), ("unknown", "other"), ("**Yes**", "other"), ("y", "yes")],
)
def test_mme_reads_the_first_four_characters(answer: str, word: str) -> None:
    assert yes_or_no(answer) == word


def test_always_yes_gets_a_quarter_of_mme() -> None:
    names = [f"category {index // 2}" for index in range(20)]
    assert mme_perception(["Yes"] * 20, ["Yes", "No"] * 10, ["1"] * 20, names) == 500


def test_seedbench_takes_the_first_character() -> None:
    assert first_letter_match("(A)", "A") == 0
    assert first_letter_match("Answer: B", "A") == first_letter_match("apple", "A") == 1
    assert first_letter_match("A", " A \n") == first_letter_match("a", "A ") == 1


def test_gqa_deletes_punctuation_and_keeps_articles() -> None:
    assert exact_match("Dark-blue.", "darkblue") == 1
    assert exact_match("dark-blue", "dark blue") == exact_match("the cat", "cat") == 0
    assert exact_match("İ", "i") == exact_match("İzmir", "İZMİR") == 1
    assert exact_match("İ", "i\u0307") == 0  # its two characters in lower case


def test_an_unread_box_has_its_centre_in_the_corner() -> None:
    assert center_inside(read_box("?"), (0.0, 0.0, 0.5, 0.5)) == 1
    assert box_iou((0.3, 0.3, 0.1, 0.1), (0.1, 0.1, 0.3, 0.3)) == 0  # a flipped box


def test_white_space_changes_the_edit_distance_and_not_bleu() -> None:
    assert page_bleu("a b\nc  d", "a b c d") == 1.0
    assert page_edit_distance("a b\nc  d", "a b c d") > 0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # lmms-eval's cal_per_metrics with jieba 0.42.1 and nltk 3.10.4
        ("今天天气很好我们去公园", "今天天气很好我们去公园玩", 0.846481724890614),
        ("第一章 模型介绍 本章介绍", "第一章 模型介绍 本章描述", 0.8091067115702212),
        ("Total 价格 12 yuan today", "Total 价格 12 yuan today", 1.0),
        ("hello", "你好世界今天天气很好", 0.0),
        ("你好世界今天天气很好", "hello", 0.0),
        ("日本語のテキスト", "日本語のテキスト", 1.0),
    ],
)
def test_chinese_pages_are_compared_by_words(
    prediction: str, reference: str, score: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert page_bleu(prediction, reference) == pytest.approx(score, abs=1e-6)
    assert not capsys.readouterr().err


def test_only_chinese_pages_need_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)  # an import of it fails
    assert page_bleu("カタカナ é ж 한글", "カタカナ é ж 한글") == 1.0
    for pair in (("图", "a"), ("a", "图")):
        with pytest.raises(ValueError, match=r"pip install jieba"):
            page_bleu(*pair)


def test_bootstrap_interval_encloses_the_mean_and_is_repeatable() -> None:
    scores = [0.0, 1.0] * 50
    low, high = bootstrap_interval(scores)
    assert (low, high) == bootstrap_interval(scores)
    assert low < 0.5 < high
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.008)  # 0.5 -+ 1.96 * 0.5 / 10
    assert bootstrap_interval([0.3] * 7) == pytest.approx((0.3, 0.3))


def metric_rows() -> list[dict[str, Any]]:
    rows = golden_rows("metrics/*.jsonl")
    if not rows:
        pytest.skip("PROXYV_GOLDEN names no folder with rows in metrics/*.jsonl")
    return rows


@pytest.mark.parametrize("there", [[], ["anls.jsonl"]])
def test_rows_are_found_by_pattern_and_none_is_a_skip(there, tmp_path, monkeypatch) -> None:
    row = {"metric": "anls", "prediction": "a\u2028b\x85\x1cc", "references": ["\n"]}
    (tmp_path / "metrics").mkdir()
    for name in there:
        text = json.dumps(row, ensure_ascii=False) + "\n"
        (tmp_path / "metrics" / name).write_text(text * 2, encoding="utf-8")
    monkeypatch.setenv("PROXYV_GOLDEN", str(tmp_path))
    if there:
        assert metric_rows() == [row, row]
    else:
        with pytest.raises(pytest.skip.Exception, match=r"no folder with rows in metrics/\*"):
            metric_rows()


def refcoco(measure: Callable[[Box, Box], float], row: dict[str, Any]) -> float:
    return measure(read_box(row["prediction"].strip()), tuple(row["references"][0]))


def right_at_half(predicted: Box, truth: Box) -> float:
    return float(box_iou(predicted, truth) >= 0.5)


def rights(row: dict[str, Any]) -> list[bool]:
    rows = zip(row["prediction"], row["references"], row["extra"]["options"], strict=True)
    return [chosen_option(answer, options) == letter for answer, letter, options in rows]


GOLDEN: dict[str, Callable[[dict[str, Any]], float]] = {
    "anls": lambda row: BENCHMARKS["docvqa"].score(row["prediction"], row["references"]),
    "relaxed_accuracy": lambda row: BENCHMARKS["chartqa"].score(
        row["prediction"], row["references"]
    ),
    "vqa_accuracy": lambda row: vqa_accuracy(row["prediction"], row["references"]),
    "ocrbench_aggregate": lambda row: ocrbench_score(row["prediction"]),
    "mmbench_static": lambda row: float(
        chosen_option(row["prediction"], row["extra"]["options"]) == row["references"][0]
    ),
    "mmbench_static_circular": lambda row: mean(
        [float(hit) for hit in circular_hits(rights(row), row["extra"]["index"]).values()]
    ),
    "ocrbench": lambda row: ocrbench_match(
        row["prediction"], row["references"], row["extra"]["dataset"]
    ),
    "mme_item": lambda row: float(
        yes_or_no(row["prediction"].strip()) == yes_or_no(row["references"][0])
    ),
    "mme_perception_aggregate": lambda row: mme_perception(
        row["prediction"],
        row["references"],
        row["extra"]["question_ids"],
        row["extra"]["categories"],
    ),
    "seedbench": lambda row: first_letter_match(row["prediction"], row["references"][0]),
    "seedbench_aggregate": lambda row: mean(
        [
            first_letter_match(*pair)
            for pair in zip(row["prediction"], row["references"], strict=True)
        ]
    ),
    "gqa_exact_match": lambda row: exact_match(row["prediction"], row["references"][0]),
    "refcoco_iou": lambda row: refcoco(box_iou, row),
    "refcoco_acc@0.5": lambda row: refcoco(right_at_half, row),
    "refcoco_center_acc": lambda row: refcoco(center_inside, row),
    "refcoco_acc@0.5_aggregate": lambda row: mean(
        [
            right_at_half(read_box(answer.strip()), tuple(truth))
            for answer, truth in zip(row["prediction"], row["references"], strict=True)
        ]
    ),
    "doc_edit_distance": lambda row: page_edit_distance(row["prediction"], row["references"][0]),
    "doc_bleu": lambda row: page_bleu(row["prediction"], row["references"][0]),
}


@pytest.mark.golden
@pytest.mark.parametrize("metric", GOLDEN)
def test_golden_scores(metric: str) -> None:
    rows = [row for row in metric_rows() if row["metric"] == metric]
    if not rows:
        pytest.skip(f"PROXYV_GOLDEN has no row of the metric {metric}")
    scores = [GOLDEN[metric](row) for row in rows]
    wrong = [
        (row["prediction"], row["references"], row["score"], score)
        for row, score in zip(rows, scores, strict=True)
        if abs(score - row["score"]) > 1e-6
    ]
    assert not wrong


@pytest.mark.golden
def test_golden_intermediate_results() -> None:
    rows = metric_rows()
    assert {row["metric"] for row in rows} <= GOLDEN.keys()
    for row in rows:
        if row["metric"] == "vqa_accuracy":
            assert normalise_vqa(row["prediction"]) == row["extra"]["normalized_prediction"]
        if row["metric"] == "mmbench_static":
            options, expected = row["extra"]["options"], row["extra"]["inferred"]
            assert inferred_option(row["prediction"], options) == expected
            if expected is None:
                fallback = row["extra"]["static_fallback"]
                assert chosen_option(row["prediction"], options) == fallback
