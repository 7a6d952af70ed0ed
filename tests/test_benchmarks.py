"""Every benchmark on a few local rows in its real schema: prompts, settings, scores, limits."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from proxyv.cli import CommandError, run_command
from proxyv.eval.__main__ import main
from proxyv.eval.benchmarks import BENCHMARKS, GROUPS, Benchmark, averages, select
from proxyv.eval.benchmarks.ocrbench import CATEGORIES
from proxyv.eval.metrics import mean, mme_perception, ocrbench_score
from proxyv.eval.records import read_records
from proxyv.eval.rescore import rescore
from proxyv.eval.runner import RunOptions, evaluate, open_output
from proxyv.eval.sources import Rows, load_rows
from proxyv.eval.tables import results_table
from proxyv.files import write_json
from tests.small_model import save_small_model

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def png(width: int = 40, height: int = 20, shade: int = 90) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (shade, shade, shade)).save(stream, "PNG")
    return stream.getvalue()


def picture(width: int = 40, height: int = 20, shade: int = 90) -> dict[str, Any]:
    return {"bytes": png(width, height, shade), "path": None}


def save_parquet(path: Path, rows: list[dict[str, Any]], images: bool = True) -> None:
    from datasets import Dataset, List
    from datasets import Image as ImageFeature

    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows)
    if images:
        listed = isinstance(rows[0]["image"], list)
        table = table.cast_column("image", List(ImageFeature()) if listed else ImageFeature())
    table.to_parquet(str(path))


class Teller:
    """Stands in for a model: answers from the prompt alone, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.tell = answer
        self.prompts: list[str] = []
        self.images: list[list[Image.Image]] = []
        self.max_new_tokens: set[int] = set()

    def length(self, question: str, sizes_hw: Sequence[tuple[int, int]]) -> int:
        return len(question) + 100 * len(sizes_hw)

    def shared_length(self, sizes_hw: Sequence[tuple[int, int]]) -> int:
        return 0

    def prepare(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        return list(questions), [list(own) for own in images]

    def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
        questions, images = prepared
        self.prompts += questions
        self.images += images
        self.max_new_tokens.add(max_new_tokens)
        return [self.tell(question) for question in questions]


def run(
    name: str, rows: Rows, output: Path, answer: Callable[[str], str], **options: Any
) -> tuple[dict[str, float], Teller, list[str], dict[str, Any]]:
    teller, lines = Teller(answer), []
    settings = RunOptions(**options)
    result = evaluate(BENCHMARKS[name], rows, teller, settings, output, lines.append)
    values = {score: entry["value"] for score, entry in result["scores"].items()}
    return values, teller, lines, result


def prompt_of(name: str, row: dict[str, Any]) -> str:
    return BENCHMARKS[name].sample(0, row).prompt


def test_answers_are_kept_as_given_and_scored_without_their_reasoning(tmp_path: Path) -> None:
    rows = Rows([{**reading_row(0, CATEGORIES[0]), "answer": ["cat"]}], "memory")
    told = "<think>a cat?</think>dog"
    values, _, _, _ = run("ocrbench", rows, tmp_path / "a", lambda _: told)
    assert values["ocrbench_accuracy"] == 0
    assert read_records(tmp_path / "a/ocrbench.jsonl")[0]["answer"] == told
    row = {"question_id": "1", "answer": ["it"], "bbox": [0.0, 0.0, 40.0, 20.0], "image": picture()}
    told = "<think>[0, 0, 0.1, 0.1]</think>[0, 0, 1, 1]"
    rows = Rows([row], "memory", picks=[(0, {"answer": "it"})])
    values, _, _, _ = run("refcoco_testA", rows, tmp_path / "b", lambda _: told)
    assert values["refcoco_IoU"] == values["refcoco_ACC@0.9"] == 1


# ---- the table


def test_every_benchmark_tells_a_question_and_its_settings() -> None:
    import importlib

    expected = {
        **{"docvqa": 32, "infovqa": 32, "chartqa": 16, "textvqa": 1024, "ocrbench": 128},
        **{"mme": 16, "mmbench": 1024, "seedbench": 1024, "gqa": 16, "ccpdf": 2048},
        **{"refcoco_testA": 1024, "refcoco_testB": 1024, "docvqa_test": 32, "infovqa_test": 32},
    }
    assert {name: task.max_new_tokens for name, task in BENCHMARKS.items()} == expected
    for name, task in BENCHMARKS.items():
        assert task.name == name
        doc = importlib.import_module(type(task).__module__).__doc__
        assert doc is not None and '"' in doc.splitlines()[0] and "->" in doc.splitlines()[0]
        assert "Source:" in doc and "Differs:" in doc
        for former in task.repositories[1:]:
            assert former.startswith("lmms-lab/")


def test_groups_stand_for_their_benchmarks() -> None:
    assert [task.name for task in select("score_fine,docvqa")] == list(GROUPS["score_fine"])
    assert [task.name for task in select("refcoco")] == ["refcoco_testA", "refcoco_testB"]
    with pytest.raises(CommandError, match="did you mean 'refcoco_testA'"):
        select("refcoco_test_A")
    with pytest.raises(CommandError, match="did you mean 'infovqa'"):
        select("infoqa")


def test_score_fine_is_the_mean_of_five_scores_in_percent() -> None:
    values = {"docvqa": 0.5, "chartqa": 0.6, "infovqa": 0.3, "textvqa": 0.7, "ocrbench": 0.4}
    tasks = {
        name: {"scores": {BENCHMARKS[name].main_score: {"value": value}}}
        for name, value in values.items()
    }
    assert averages(tasks) == {"score_fine": pytest.approx(50.0)}
    del tasks["ocrbench"]
    assert averages(tasks) == {}


# ---- questions about text


def document_row(index: int) -> dict[str, Any]:
    return {
        "questionId": str(65000 + index),
        "question": f"What is on line {index}?",
        "answers": [f"line {index}", f"Line {index}."],
        "answer_type": ["single span"],
        "image": picture(),
        "image_url": f"http://example.org/{index // 2}.png",
        "operation/reasoning": [""],
        "ocr": "",
        "data_split": "val",
    }


def line_number(prompt: str) -> str:
    return prompt.split("?")[0].split()[-1]


def test_infovqa(tmp_path: Path) -> None:
    path = tmp_path / "infovqa/validation-00000-of-00001.parquet"
    save_parquet(path, [document_row(index) for index in range(4)])
    rows = load_rows(BENCHMARKS["infovqa"], tmp_path)
    values, teller, _, _ = run("infovqa", rows, tmp_path, lambda q: f"line {line_number(q)}")
    assert values == {"anls": 1.0}
    assert "What is on line 3?" + PHRASE in teller.prompts
    assert teller.max_new_tokens == {32}
    first = read_records(tmp_path / "infovqa.jsonl")[0]
    assert first["document"].startswith("http://example.org/")


@pytest.mark.parametrize("name", ["docvqa_test", "infovqa_test"])
def test_test_splits_write_the_file_for_the_server(tmp_path: Path, name: str) -> None:
    rows = [document_row(index) for index in range(3)]
    for row in rows:
        del row["answers"]
    rows[1]["image"] = {"bytes": b"broken", "path": None}
    table = Rows(rows, "memory")
    values, _, lines, result = run(name, table, tmp_path, lambda q: f" {line_number(q)} ")
    assert values == {} and result["failed"] == 1
    written = json.loads((tmp_path / f"{name}_for_submission.json").read_text("utf-8"))
    assert written == [
        {"questionId": 65000, "answer": "0"},
        {"questionId": 65001, "answer": ""},
        {"questionId": 65002, "answer": "2"},
    ]
    assert lines[-1].endswith(
        "is not for upload: 1 questions could not be asked and have no answer"
    )
    assert {record["score"] for record in read_records(tmp_path / f"{name}.jsonl")} == {None}


@pytest.mark.parametrize("rows_known", [True, False])
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, None),
        ({"limit": 3}, None),
        ({"limit": 2}, "--limit took the first 2 questions"),
        ({"control": "blank-images"}, "the images were changed by --control blank-images"),
    ],
)
def test_only_a_whole_submission_is_offered_for_upload(
    tmp_path: Path, options: dict[str, Any], fault: str | None, rows_known: bool
) -> None:
    rows = Rows([document_row(index) for index in range(3)], "memory")
    *_, lines, result = run("docvqa_test", rows, tmp_path, lambda _: "x", **options)
    if not rows_known:  # as in older results
        del result["rows"]
    results = {"model": "m", "tasks": {"docvqa_test": result}, "settings": options}
    write_json(tmp_path / "results.json", results)
    again: list[str] = []
    if options == {"limit": 3} and not rows_known:  # there may be more
        fault, lines = "--limit took the first 3 questions", []
    rescore(tmp_path, again.append)
    for line in [*lines[-1:], *again]:
        assert line.startswith("docvqa_test: ")
        assert ("upload /" in line) == (fault is None)
        assert (f"is not for upload: {fault}" in line) == (fault is not None)
    assert len(again) == 1


@pytest.mark.parametrize(
    ("number", "written"),
    [(7, 7), (7.0, 7), ("7", 7), ("q-17", None), (7.5, None), (float("nan"), None), (True, None)],
)
def test_ids_that_the_test_server_cannot_take_are_found_before_anything_is_asked(
    tmp_path: Path, number: Any, written: int | None
) -> None:
    rows = [{**document_row(index), "image": "x.png"} for index in range(2)]
    rows[1]["questionId"] = number
    (tmp_path / "docvqa").mkdir()
    (tmp_path / "docvqa/x.png").write_bytes(png())
    (tmp_path / "docvqa/test.json").write_text(json.dumps(rows), encoding="utf-8")
    if written is None:
        with pytest.raises(CommandError, match=r"row 1 of .*test\.json has 'questionId' '"):
            load_rows(BENCHMARKS["docvqa_test"], tmp_path)
        return
    run("docvqa_test", load_rows(BENCHMARKS["docvqa_test"], tmp_path), tmp_path, lambda _: "x")
    told = json.loads((tmp_path / "docvqa_test_for_submission.json").read_text("utf-8"))
    assert [entry["questionId"] for entry in told] == [65000, written]


def test_a_test_split_is_found_beside_the_validation_split(tmp_path: Path) -> None:
    rows = [document_row(index) for index in range(3)]
    save_parquet(tmp_path / "docvqa/data/validation-00000-of-00001.parquet", rows)
    save_parquet(tmp_path / "docvqa/data/test-00000-of-00001.parquet", rows[:1])
    assert len(load_rows(BENCHMARKS["docvqa_test"], tmp_path)) == 1
    assert len(load_rows(BENCHMARKS["docvqa"], tmp_path)) == 3


def text_row(answers: list[str]) -> dict[str, Any]:
    return {
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "question": "what is the brand of this Nokia PHONE?",
        "image": picture(),
        "answers": answers,
        "ocr_tokens": ["NOKIA"],
        "set_name": "val",
    }


def test_textvqa_capitalises_and_shows_no_recognised_text(tmp_path: Path) -> None:
    rows = [text_row(["nokia"] * 2 + ["phone"] * 8), text_row(["Nokia"] * 10)]
    save_parquet(tmp_path / "textvqa/validation.parquet", rows)
    table = load_rows(BENCHMARKS["textvqa"], tmp_path)
    values, teller, _, _ = run("textvqa", table, tmp_path, lambda _: "a Nokia.")
    assert values == {"exact_match": pytest.approx(0.8)}
    assert teller.prompts[0] == "What is the brand of this nokia phone?" + PHRASE


def reading_row(index: int, category: str, dataset: str = "IIIT5K") -> dict[str, Any]:
    return {
        "dataset": dataset,
        "question": f" what is written in the image {index}? ",
        "question_type": category,
        "answer": ["CENTRE"] if dataset == "IIIT5K" else ["\\frac {A} {2}"],
        "image": picture(shade=index),
    }


def test_ocrbench_counts_out_of_a_thousand(tmp_path: Path) -> None:
    rows = [reading_row(index, category) for index, category in enumerate(CATEGORIES[:9])]
    rows.append(reading_row(9, CATEGORIES[9], "HME100k"))
    save_parquet(tmp_path / "ocrbench/test.parquet", rows)
    table = load_rows(BENCHMARKS["ocrbench"], tmp_path)
    tell = {"9": "\\frac{A}{2}", "0": "nothing"}
    answer = lambda q: tell.get(q[-2], "the Centre.")  # noqa: E731
    values, teller, _, result = run("ocrbench", table, tmp_path / "a", answer)
    assert values.pop("ocrbench_accuracy") == 0.009
    assert values == {category: float(category != CATEGORIES[0]) for category in CATEGORIES}
    assert "what is written in the image 3?" in teller.prompts
    assert result["scores"]["ocrbench_accuracy"]["samples"] == 10
    _, _, lines, _ = run("ocrbench", table, tmp_path / "b", answer, limit=2)
    assert "and 3 more kinds" in lines[0]
    assert "out of 1,000, however many are asked" in lines[1]


def test_ocrbench_category_must_be_known(tmp_path: Path) -> None:
    _, _, _, result = run(
        "ocrbench", Rows([reading_row(0, "Reading")], "memory"), tmp_path, lambda _: "Centre"
    )
    assert "'question_type' holds 'Reading'" in result["errors"][0]
    assert result["scores"]["ocrbench_accuracy"]["value"] == 0


# ---- yes or no, letters


def mme_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": f"{category}/{number}.jpg",
            "image": picture(),
            "question": f"Is it {word}? Please answer yes or no.",
            "answer": "Yes" if word == "right" else "No",
            "category": category,
        }
        for word in ("right", "wrong")
        for category, number in [("OCR", 1), ("OCR", 2), ("artwork", 1), ("code_reasoning", 1)]
    ]


def test_mme_adds_the_categories_of_perception(tmp_path: Path) -> None:
    save_parquet(tmp_path / "mme/test.parquet", mme_rows())
    rows = load_rows(BENCHMARKS["mme"], tmp_path)
    assert len(rows) == 6
    values, teller, _, result = run("mme", rows, tmp_path / "a", lambda _: "Yes")
    assert values == {"mme_perception_score": 100.0, "OCR": 50.0, "artwork": 50.0}
    assert set(teller.prompts) == {f"Is it {word}?{PHRASE}" for word in ("right", "wrong")}
    assert result["scores"]["mme_perception_score"]["samples"] == 3
    answer = lambda q: "Yes" if "right" in q else "No."  # noqa: E731
    values, _, _, _ = run("mme", rows, tmp_path / "b", answer)
    assert values["mme_perception_score"] == 400.0


def test_mme_agrees_with_its_metric_on_unequal_categories(tmp_path: Path) -> None:
    rows = Rows(mme_rows(), "memory", picks=[(index, {}) for index in (0, 1, 2, 4, 5, 6)])
    answers = iter(["Yes", "No", "No", "Yes", "No", "Yes"])
    values, _, _, _ = run("mme", rows, tmp_path, lambda _: next(answers), batch_size=1)
    records = read_records(tmp_path / "mme.jsonl")
    assert values["mme_perception_score"] == pytest.approx(
        mme_perception(
            [record["answer"] for record in records],
            [record["references"][0] for record in records],
            [record["question_id"] for record in records],
            [record["kind"] for record in records],
        )
    )


def test_mme_limit_keeps_whole_pairs(tmp_path: Path) -> None:
    rows = mme_rows()[:3] + mme_rows()[4:7]  # the first pair ends at row 4
    table = Rows(rows, "memory")
    values, _, lines, result = run("mme", table, tmp_path, lambda _: "Yes", limit=5)
    assert result["samples"] == 4 and values["mme_perception_score"] == 50.0
    assert "leaves out every row of artwork" in lines[0]
    with pytest.raises(CommandError, match="--limit 2: mme is scored in groups of 2 rows"):
        run("mme", table, tmp_path / "b", lambda _: "Yes", limit=2)
    odd = Rows(rows[:5], "memory")
    with pytest.raises(CommandError, match=r"1 rows of \('artwork', 'artwork/1.jpg'\)"):
        run("mme", odd, tmp_path / "c", lambda _: "Yes")


def choice_row(index: int, rotation: int = 0, **changes: Any) -> dict[str, Any]:
    animals = ["cat", "dog", "bird", "fish"]
    turned = animals[rotation:] + animals[:rotation]
    return {
        "index": index + 1_000_000 * rotation,
        "question": f"Which animal is {index}?",
        "hint": "nan",
        "answer": "ABCD"[turned.index("dog")],
        **dict(zip("ABCD", turned, strict=True)),
        "category": "object_localization",
        "image": picture(shade=index),
        "source": "reasonseg",
        "L2-category": "finegrained_perception",
        "comment": "nan",
        "split": "dev",
        **changes,
    }


def test_mmbench_prompt_has_an_empty_line_before_the_instruction() -> None:
    row = choice_row(1, hint="Look.", C="nan", D=float("nan"), E=None)
    expected = f"Look. Which animal is 1? There are several options:\nA. cat\nB. dog\n\n{LETTER}"
    assert prompt_of("mmbench", row) == expected
    sample = BENCHMARKS["mmbench"].sample(0, row)
    assert sample.details["options"] == {"A": "cat", "B": "dog", "C": "nan"}


def test_mmbench_takes_numbers_as_tables_with_gaps_store_them(tmp_path: Path) -> None:
    rows = [choice_row(1), choice_row(1, 1), choice_row(2)]
    changed = [{**row, "index": float(row["index"])} for row in rows]
    changed[2]["index"] = 2.5
    values, _, _, result = run("mmbench", Rows(changed, "memory"), tmp_path, lambda _: "a dog")
    assert values["circular_accuracy"] == 50.0 and result["failed"] == 1
    numbers = [record["question_id"] for record in read_records(tmp_path / "mmbench.jsonl")]
    assert numbers == ["1", "1000001", "2.5"]
    assert "'index' holds '2.5'" in result["errors"][0]


def test_mmbench_options_end_without_empty_lines() -> None:
    row = choice_row(1, D="fish\n\n")
    assert f"\nC. bird\nD. fish\n\n{LETTER}" in prompt_of("mmbench", row)
    row = choice_row(1, B="dog\n")  # only the last one's are cut
    assert "\nB. dog\n\nC. bird\n" in prompt_of("mmbench", row)
    row = choice_row(1, A="", B=None, C="nan", D="")
    assert prompt_of("mmbench", row).endswith(f"There are several options:\n\n{LETTER}")


def test_mmbench_counts_a_question_only_if_every_rotation_is_right(tmp_path: Path) -> None:
    rows = [choice_row(1), choice_row(2), choice_row(1, 1), choice_row(2, 1), choice_row(3)]
    save_parquet(tmp_path / "mmbench/dev-00000-of-00001.parquet", rows)
    table = load_rows(BENCHMARKS["mmbench"], tmp_path)

    def answer(prompt: str) -> str:
        return "B" if " 2?" in prompt else "it is a dog"  # always B: right once, wrong rotated

    values, _, _, result = run("mmbench", table, tmp_path / "a", answer)
    assert values == {
        "circular_accuracy": pytest.approx(200 / 3),
        "vanilla_accuracy": pytest.approx(100.0),
    }
    assert result["scores"]["circular_accuracy"]["samples"] == 3
    values, _, lines, _ = run("mmbench", table, tmp_path / "b", answer, limit=2)
    assert values["circular_accuracy"] == 100.0
    assert "rotations are left out" in lines[0]


def test_mmbench_without_a_number_is_one_failed_question(tmp_path: Path) -> None:
    rows = Rows([choice_row(1), {**choice_row(2), "index": None}], "memory")
    values, _, _, result = run("mmbench", rows, tmp_path, lambda _: "B")
    assert values == {"circular_accuracy": 50.0, "vanilla_accuracy": 50.0}
    assert "'index' holds 'None'" in result["errors"][0]


def seed_row(index: int, data_type: str = "image") -> dict[str, Any]:
    return {
        "answer": "B",
        **{f"choice_{letter}": f"{letter}{index}" for letter in "abcd"},
        "data_id": f"{index}.jpg",
        "data_type": data_type,
        "question": f"How many towels are in image {index}?",
        "question_id": str(101669 + index),
        "question_type_id": 5,
        "segment": None,
        "image": [picture(30 + index)],
    }


def test_seedbench_asks_images_only_and_takes_the_first_letter(tmp_path: Path) -> None:
    rows = [seed_row(0), seed_row(1, "video"), seed_row(2), seed_row(3)]
    save_parquet(tmp_path / "seedbench/test.parquet", rows)
    table = load_rows(BENCHMARKS["seedbench"], tmp_path)
    tell = {"0": "B", "2": "bird", "3": "(B)"}
    values, teller, _, _ = run("seedbench", table, tmp_path, lambda q: tell[q.split("?")[0][-1]])
    assert values == {"seed_image": pytest.approx(2 / 3)}
    assert (
        f"How many towels are in image 0?\nA. a0\nB. b0\nC. c0\nD. d0\n{LETTER}" in teller.prompts
    )
    assert sorted(own[0].width for own in teller.images) == [30, 32, 33]


# ---- GQA


def gqa_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"2013{index}",
            "imageId": f"n{index // 2}",
            "question": f"Is it overcast {index}?",
            "answer": "no",
            "fullAnswer": "No, it is clear.",
            "isBalanced": True,
        }
        for index in range(4)
    ]


def test_gqa_finds_its_images_in_the_second_table(tmp_path: Path) -> None:
    config = BENCHMARKS["gqa"].config
    save_parquet(tmp_path / f"gqa/{config}/testdev.parquet", gqa_rows(), images=False)
    images = [{"id": "n1", "image": picture(31)}, {"id": "n0", "image": picture(30)}]
    save_parquet(tmp_path / "gqa/testdev_balanced_images/testdev.parquet", images)
    rows = load_rows(BENCHMARKS["gqa"], tmp_path)
    values, teller, _, _ = run("gqa", rows, tmp_path, lambda q: "No." if "3" in q else "none")
    assert values == {"exact_match": 0.25}
    shown = zip(teller.prompts, teller.images, strict=True)
    widths = {prompt: own[0].width for prompt, own in shown}
    assert widths == {f"Is it overcast {n}?{PHRASE}": 30 + n // 2 for n in range(4)}


def test_gqa_takes_images_in_its_rows_and_misses_absent_ones(tmp_path: Path) -> None:
    save_parquet(
        tmp_path / "a/gqa/testdev.parquet", [{**row, "image": picture()} for row in gqa_rows()]
    )
    rows = load_rows(BENCHMARKS["gqa"], tmp_path / "a")
    assert run("gqa", rows, tmp_path / "a", lambda _: "no")[0] == {"exact_match": 1.0}
    save_parquet(tmp_path / "b/gqa/testdev.parquet", gqa_rows(), images=False)
    with pytest.raises(CommandError, match=r"no column 'image', and there is no folder .*images"):
        load_rows(BENCHMARKS["gqa"], tmp_path / "b")
    only = [{"id": "n0", "image": picture()}]
    save_parquet(tmp_path / "b/gqa/testdev_balanced_images/testdev.parquet", only)
    rows = load_rows(BENCHMARKS["gqa"], tmp_path / "b")
    values, _, _, result = run("gqa", rows, tmp_path / "b", lambda _: "no")
    assert values == {"exact_match": 0.5}
    assert result["errors"] == ["20132: row 2 has no image", "20133: row 3 has no image"]


def test_gqa_image_list_has_paths_relative_to_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "gqa/testdev_balanced_images"
    folder.mkdir(parents=True)
    (tmp_path / "gqa/testdev.json").write_text(json.dumps(gqa_rows()[:1]), encoding="utf-8")
    (folder / "testdev.json").write_text(json.dumps([{"id": "n0", "image": "a.png"}]), "utf-8")
    (folder / "a.png").write_bytes(png())
    rows = load_rows(BENCHMARKS["gqa"], tmp_path)
    assert run("gqa", rows, tmp_path, lambda _: "no")[0] == {"exact_match": 1.0}


def test_gqa_rows_without_the_name_of_an_image_fail_alone(tmp_path: Path) -> None:
    folder = tmp_path / "gqa/testdev_balanced_images"
    folder.mkdir(parents=True)
    rows = gqa_rows()
    del rows[1]["imageId"]
    rows[2]["imageId"] = None
    (tmp_path / "gqa/testdev.json").write_text(json.dumps(rows), encoding="utf-8")
    images = [{"id": "n0", "image": "a.png"}, {"image": "a.png"}, {"id": "n1"}]
    (folder / "testdev.json").write_text(json.dumps(images), encoding="utf-8")
    (folder / "a.png").write_bytes(png())
    values, _, _, result = run(
        "gqa", load_rows(BENCHMARKS["gqa"], tmp_path), tmp_path, lambda _: "no"
    )
    assert values == {"exact_match": 0.25}
    assert result["errors"] == [f"2013{row}: row {row} has no image" for row in (1, 2, 3)]


def test_gqa_loads_two_tables_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    images = Dataset.from_list([{"id": "n0", "image": picture(33)}])
    tables = {
        "testdev_balanced_instructions": Dataset.from_list(gqa_rows()),
        "testdev_balanced_images": images.cast_column("image", ImageFeature()),
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", lambda _, config, split: tables[config])
    rows = load_rows(BENCHMARKS["gqa"])
    assert rows.origin == "hub:lmms-lab-encoder/GQA/testdev"
    assert rows[0]["image"]["bytes"] == png(33) and rows[2]["image"] is None


# ---- boxes


def box_row(index: int, sentences: list[str]) -> dict[str, Any]:
    return {
        "question_id": str(index),
        "image": picture(80, 40),
        "question": "Please carefully observe the area circled in the image.",
        "answer": sentences,
        "segmentation": [0.0],
        "bbox": [20.0, 10.0, 40.0, 20.0],
        "iscrowd": 0,
        "file_name": f"COCO_train2014_{index}.jpg",
    }


def test_refcoco_asks_each_sentence_and_averages_both_parts(tmp_path: Path) -> None:
    save_parquet(tmp_path / "refcoco/data/testA-0.parquet", [box_row(0, ["man", "left guy"])])
    save_parquet(tmp_path / "refcoco/data/testB-0.parquet", [box_row(1, ["dog"])])
    save_parquet(tmp_path / "refcoco/data/test-0.parquet", [box_row(2, ["cat"])])
    tell = {"man": "[0.25, 0.25, 0.75, 0.75]", "guy": "[0.25, 0.25, 0.5, 0.75]", "dog": "nowhere"}
    tasks = {}
    for task in select("refcoco"):
        rows = load_rows(task, tmp_path)
        values, teller, _, tasks[task.name] = run(
            task.name, rows, tmp_path, lambda q: tell[q.split()[-1]]
        )
        if task.name == "refcoco_testA":
            assert values["refcoco_ACC@0.5"] == 1.0  # an overlap of exactly a half counts
            assert values["refcoco_IoU"] == pytest.approx(0.75)
            assert values["refcoco_ACC@0.7"] == 0.5 and values["refcoco_Center_ACC"] == 1.0
            assert any(prompt.endswith("describes: left guy") for prompt in teller.prompts)
        else:
            assert values["refcoco_ACC@0.5"] == 0.0
    assert averages(tasks) == {"refcoco": 50.0}
    truth = read_records(tmp_path / "refcoco_testA.jsonl")[0]["references"]
    assert json.loads(truth[0]) == [0.25, 0.25, 0.75, 0.75]


def test_refcoco_boxes_are_fractions_of_the_width_and_of_the_height() -> None:
    task = BENCHMARKS["refcoco_testA"]
    pixels = task.sample(0, {"answer": "man", "bbox": [8, 10, 24, 5]})  # x, y, width, height
    sample = task.with_image_size(pixels, (40, 80))
    assert json.loads(sample.references[0]) == pytest.approx([0.1, 0.25, 0.4, 0.375])
    half, whole = "[0.25, 0.25, 0.5, 0.75]", "[0.25, 0.25, 0.75, 0.75]"
    assert task.score(half, [whole]) == 1.0  # an overlap of exactly a half counts


def test_refcoco_boxes_need_the_image_even_where_it_is_not_shown(tmp_path: Path) -> None:
    rows = Rows([{**box_row(0, []), "answer": "man"}], "memory")
    answer = lambda _: "[0.25, 0.25, 0.75, 0.75]"  # noqa: E731
    values, teller, _, _ = run("refcoco_testA", rows, tmp_path, answer, control="question-only")
    assert values["refcoco_IoU"] == pytest.approx(1.0) and teller.images == [[]]


def test_refcoco_bad_rows_fail_alone(tmp_path: Path) -> None:
    rows = [box_row(0, []), {**box_row(1, ["man"]), "bbox": [1.0]}, box_row(2, ["dog"])]
    (tmp_path / "refcoco").mkdir()
    for row in rows:
        row["image"] = "x.png"
    (tmp_path / "refcoco/x.png").write_bytes(png(80, 40))
    (tmp_path / "refcoco/testB.json").write_text(json.dumps(rows), encoding="utf-8")
    table = load_rows(BENCHMARKS["refcoco_testB"], tmp_path)
    values, _, _, result = run("refcoco_testB", table, tmp_path, lambda _: "[0, 0, 1, 1]")
    assert result["failed"] == 2 and values["refcoco_IoU"] == pytest.approx(0.25 / 3)
    assert "'answer' holds []" in result["errors"][0]
    assert "four numbers" in result["errors"][1]


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, None, 2],
        [0, 0, float("nan"), 2],
        [0, 0, 1e60, 2],
        [0, 0, float("inf"), 2],
        [0, 0, "wide", 2],
        [0, 0, [1], 2],
        {"x": 0},
        "0123",
        None,
    ],
)
def test_refcoco_boxes_that_are_none_fail_alone(tmp_path: Path, box: Any) -> None:
    rows = [{**box_row(0, []), "answer": "man"}, {**box_row(1, []), "answer": "dog", "bbox": box}]
    answer = lambda _: "[0.25, 0.25, 0.75, 0.75]"  # noqa: E731
    values, _, _, result = run("refcoco_testA", Rows(rows, "memory"), tmp_path, answer)
    assert values["refcoco_ACC@0.5"] == 0.5 and result["failed"] == 1
    assert result["errors"][0].startswith("1: column 'bbox' holds ")


# ---- pages


def page_row(index: int, prompt: str, text: str, origin: str = "CCpdf") -> dict[str, Any]:
    return {
        "image": [f"./val_imgs/{origin}/pages/{index}.png"],
        "messages": [
            {"role": "user", "content": f"<|image|>{prompt}"},
            {"role": "assistant", "content": text},
        ],
        "task_name": "page",
        "dataset_name": origin,
    }


def test_ccpdf_reads_whole_pages(tmp_path: Path) -> None:
    text = "one two three\nfour five"
    rows = [
        page_row(0, "Recognize text in the image.", f"<doc> {text} </doc>"),
        page_row(1, "Recognize text in the image.", text),
        page_row(2, "Where is <ocr> one </ocr>?", "<bbox>1,2,3,4</bbox>"),
        page_row(3, "Recognize text in the image.", text, origin="DUE"),
        page_row(4, "Recognize text in the image.", text),
    ]
    folder = tmp_path / "ccpdf/val_imgs/CCpdf/pages"
    folder.mkdir(parents=True)
    for index in (0, 1):
        (folder / f"{index}.png").write_bytes(png())
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "ccpdf/val.jsonl").write_text(lines, encoding="utf-8")
    table = load_rows(BENCHMARKS["ccpdf"], tmp_path)
    assert len(table) == 3
    values, teller, _, result = run("ccpdf", table, tmp_path, lambda _: f"<doc>{text}</doc>\n")
    assert values == {
        "doc_bleu": pytest.approx(2 / 3),
        "doc_edit_distance": pytest.approx(1 / 3),
    }
    assert set(teller.prompts) == {"Recognize text in the image."}
    assert result["failed"] == 1 and "4.png cannot be read" in result["errors"][0]


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        ("Recognize text", "'conversations' holds no list"),
        (["Recognize text", "one two"], "'conversations' holds a list of other things"),
        ({"role": ["user", "assistant"], "content": ["a", "b"]}, "'conversations' holds no list"),
        (7, "'conversations' holds no list"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "no message of the"),
        ([], "no message of the user"),
    ],
)
def test_ccpdf_pages_without_messages_fail_alone(
    tmp_path: Path, conversation: Any, problem: str
) -> None:
    rows = [page_row(index, "Recognize text in the image.", "a b c d e") for index in range(3)]
    for row in rows:
        row["image"] = ["a.png"]
        row["conversations"] = row.pop("messages")
    rows[1]["conversations"] = conversation
    rows[2] = {**rows[1], "dataset_name": "DUE"}  # which is another data set's affair
    (tmp_path / "ccpdf").mkdir()
    (tmp_path / "ccpdf/a.png").write_bytes(png())
    (tmp_path / "ccpdf/val.json").write_text(json.dumps(rows), encoding="utf-8")
    table = load_rows(BENCHMARKS["ccpdf"], tmp_path)
    values, _, _, result = run("ccpdf", table, tmp_path, lambda _: "a b c d e")
    assert values["doc_bleu"] == 0.5
    assert len(result["errors"]) == 1 and problem in result["errors"][0]


@pytest.mark.parametrize("listed", [True, False])
def test_ccpdf_finds_its_pages_by_their_paths_in_every_form(tmp_path: Path, listed: bool) -> None:
    from datasets import Dataset

    rows = [page_row(0, "Read.", "a b c d"), page_row(1, "Read.", "a b c d", origin="DUE")]
    for row in rows:
        row["dataset_name"] = "pages"
        row["image"] = row["image"] if listed else row["image"][0]
    for form in ("json", "parquet", "saved"):
        pages = tmp_path / form / "ccpdf/val_imgs/CCpdf/pages"
        pages.mkdir(parents=True)
        (pages / "0.png").write_bytes(png())
    (tmp_path / "json/ccpdf/val.json").write_text(json.dumps(rows), encoding="utf-8")
    save_parquet(tmp_path / "parquet/ccpdf/val.parquet", rows, images=False)
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved/ccpdf"))
    for form in ("json", "parquet", "saved"):
        table = load_rows(BENCHMARKS["ccpdf"], tmp_path / form)
        assert len(table) == 1
        values, _, _, result = run("ccpdf", table, tmp_path / form, lambda _: "a b c d")
        assert values["doc_bleu"] == 1 and result["failed"] == 0


def test_ccpdf_takes_the_other_schema_and_is_not_on_the_hub(tmp_path: Path) -> None:
    row = page_row(0, "Recognize text in the image.", "one two three four")
    row["conversations"] = row.pop("messages")
    row["image"] = picture()
    save_parquet(tmp_path / "ccpdf/val.parquet", [row])
    rows = load_rows(BENCHMARKS["ccpdf"], tmp_path)
    assert run("ccpdf", rows, tmp_path, lambda _: "one two three four")[0]["doc_bleu"] == 1
    del row["conversations"]
    save_parquet(tmp_path / "b/ccpdf/val.parquet", [row])
    with pytest.raises(CommandError, match="lacks the column 'messages or conversations'"):
        load_rows(BENCHMARKS["ccpdf"], tmp_path / "b")
    with pytest.raises(CommandError, match=r"no table of it on the hub; give --data DIR .*ccpdf"):
        load_rows(BENCHMARKS["ccpdf"])


# ---- damaged rows of any benchmark


ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "docvqa": lambda: [{**document_row(index), "docId": index} for index in range(3)],
    "infovqa": lambda: [document_row(index) for index in range(3)],
    "chartqa": lambda: [
        {"type": "human_test", "question": f"How much {index}?", "answer": "4"}
        for index in range(3)
    ],
    "textvqa": lambda: [text_row(["nokia"] * 10) for _ in range(3)],
    "ocrbench": lambda: [reading_row(index, CATEGORIES[index]) for index in range(3)],
    "mme": lambda: mme_rows(),
    "mmbench": lambda: [choice_row(index) for index in range(3)],
    "seedbench": lambda: [seed_row(index) for index in range(3)],
    "gqa": lambda: gqa_rows(),
    "refcoco_testA": lambda: [box_row(index, ["man", "guy"]) for index in range(3)],
    "ccpdf": lambda: [page_row(index, "Read.", "one two three four") for index in range(3)],
}
CELLS = [None, "", "text", 7, 1.5, True, [], [None], ["a"], [[1]], {}, {"a": None}, [{}], "absent"]


@pytest.mark.parametrize("name", ROWS)
def test_no_cell_of_a_row_ends_a_run(tmp_path: Path, name: str) -> None:
    """Whatever stands in a cell, the rows without it are asked."""
    task = BENCHMARKS[name]
    folder = tmp_path / (task.folder or name)
    folder.mkdir()
    (folder / "x.png").write_bytes(png())
    sound = [{**row, "image": "x.png"} for row in ROWS[name]()]
    damaged = []
    for number, (column, cell) in enumerate(itertools.product(sound[0], CELLS)):
        row, partner = dict(sound[0]), dict(sound[0])
        if name == "mme":
            if column in ("question_id", "category"):
                continue  # what makes two rows a pair, see the next test
            row["question_id"] = partner["question_id"] = f"{number}.jpg"
            damaged.append(partner)
        row[column] = cell
        if cell == "absent":
            del row[column]
        damaged.append(row)
    (folder / f"{task.split}.json").write_text(json.dumps(sound + damaged), encoding="utf-8")
    run(name, load_rows(task, tmp_path), tmp_path / "out", lambda _: "B")
    asked = sum(len(task.questions(row)) for row in sound)
    records = read_records(tmp_path / f"out/{name}.jsonl")
    assert [record["error"] for record in records[:asked]] == [None] * asked
    assert any(record["error"] is not None for record in records[asked:])


@pytest.mark.parametrize("column", ["question_id", "category"])
def test_mme_rows_without_a_partner_are_named_whatever_stands_there(
    tmp_path: Path, column: str
) -> None:
    for cell in CELLS:
        rows = [{**row, "image": "x.png"} for row in mme_rows()]
        rows[1][column] = cell
        (tmp_path / "mme").mkdir(exist_ok=True)
        (tmp_path / "mme/test.json").write_text(json.dumps(rows), encoding="utf-8")
        with pytest.raises(CommandError, match=r"row 1 of .* has no 'question_id'|holds 1 rows of"):
            run("mme", load_rows(BENCHMARKS["mme"], tmp_path), tmp_path, lambda _: "Yes")


# ---- scores of whole runs


def test_parts_of_a_score_average_to_it() -> None:
    records = [
        {"score": float(index % 3 > 0), "kind": CATEGORIES[index % 10], "question_id": str(index)}
        for index in range(30)
    ]
    for score in BENCHMARKS["ocrbench"].scores(records).values():
        assert mean(score.parts) == pytest.approx(score.value)
    total = ocrbench_score([record["score"] for record in records])
    assert BENCHMARKS["ocrbench"].scores(records)["ocrbench_accuracy"].value == total


def finished_run(folder: Path) -> None:
    open_output(folder, {"weights": "w", "control": None})
    rows = Rows([reading_row(index, CATEGORIES[0]) for index in range(3)], "memory")
    task = run("ocrbench", rows, folder, lambda _: "a centre")[3]
    results = {"model": "m", "tasks": {"ocrbench": task}, "settings": {"control": None}}
    write_json(folder / "results.json", results)


def test_rescore_gives_the_same_scores_without_model_and_data(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = json.loads((tmp_path / "results.json").read_text("utf-8"))
    lines: list[str] = []
    after = rescore(tmp_path, lines.append)
    assert after["tasks"] == before["tasks"] and not lines
    assert after["rescored"]["date"]


def test_rescore_follows_a_changed_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(tmp_path)

    def strict(self: Benchmark, answer: str, references: Sequence[str], details: Any) -> float:
        assert details == {"dataset": "IIIT5K"}
        return float(answer in references)

    monkeypatch.setattr(type(BENCHMARKS["ocrbench"]), "score", strict)
    assert main(["rescore", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "ocrbench: ocrbench_accuracy was 0.003, is 0.0" in shown.err
    assert "ocrbench_accuracy" in shown.out
    assert {record["score"] for record in read_records(tmp_path / "ocrbench.jsonl")} == {0.0}
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results["tasks"]["ocrbench"]["scores"]["ocrbench_accuracy"]["value"] == 0


def test_command_answers_other_schemas_and_rescores_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_small_model(tmp_path / "model")
    save_parquet(tmp_path / "data/mme/test.parquet", mme_rows())
    boxed = [{**row, "image": picture(50, 30)} for row in gqa_rows()]
    save_parquet(tmp_path / "data/gqa/testdev.parquet", boxed)
    documents = [document_row(index) for index in range(3)]
    save_parquet(tmp_path / "data/docvqa/test.parquet", documents)
    output = tmp_path / "run"
    command = ["--model", str(model), "--data", str(tmp_path / "data"), "--device", "cpu"]
    tasks = ["mme", "gqa", "docvqa_test"]
    assert main([*command, "--tasks", ",".join(tasks), "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "for the test server" in shown.out and "mme_perception_score" in shown.out
    before = json.loads((output / "results.json").read_text("utf-8"))
    assert list(before["tasks"]) == tasks and before["averages"] == {}
    assert len(json.loads((output / "docvqa_test_for_submission.json").read_text("utf-8"))) == 3
    assert main(["rescore", str(output), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["tasks"] == before["tasks"] and " was " not in shown.err


def test_long_names_wrap_in_eighty_columns() -> None:
    entry = {"value": 0.5, "interval": [0.4, 0.6], "samples": 1000}
    task = {"scores": {CATEGORIES[9]: entry}, "failed": 0}
    total = {"value": 1500.25, "interval": [1400.0, 1600.0], "samples": 1187}
    tasks = {"ocrbench": task, "mme": {"scores": {"mme_perception_score": total}, "failed": 0}}
    results = {"model": "m", "settings": {"control": None}, "tasks": tasks}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table({**results, "averages": {"score_fine": 54.637}}))
    text = console.export_text()
    assert "…" not in text
    for part in ("Handwritten", "1500.25", "1400.00 .. 1600.00", "0.5000", "54.64"):
        assert part in text


def test_rescore_refuses_unfinished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["rescore", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    finished_run(tmp_path)
    path = tmp_path / "ocrbench.jsonl"
    path.write_text(path.read_text("utf-8").split("\n")[0] + "\n", encoding="utf-8")
    assert run_command(main, ["rescore", str(tmp_path)]) == 2
    assert "holds 1 samples, results.json was made from 3" in capsys.readouterr().err
