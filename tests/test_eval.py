"""The evaluation command: sources, controls, batches, resuming, bad samples, result files."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from proxyv import provenance
from proxyv.cli import CommandError, run_command
from proxyv.data.images import image_of_bytes
from proxyv.eval.__main__ import main
from proxyv.eval.answerer import Answerer, user_message
from proxyv.eval.benchmarks import BENCHMARKS, select
from proxyv.eval.controls import check_control, derange
from proxyv.eval.images import row_images
from proxyv.eval.plan import make_batches, make_items
from proxyv.eval.records import read_records, rewrite_records
from proxyv.eval.runner import RunOptions, evaluate, open_output
from proxyv.eval.sources import Rows, load_rows
from proxyv.eval.tables import results_table
from proxyv.files import write_json
from proxyv.provenance import fingerprint
from tests.small_model import save_small_model

DOCVQA, CHARTQA = BENCHMARKS["docvqa"], BENCHMARKS["chartqa"]


def png(shade: int, size_hw: tuple[int, int] = (20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((*size_hw, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def document_rows(count: int) -> list[dict[str, Any]]:
    """Two questions on each document; the answer is the shade of its page."""
    return [
        {
            "questionId": str(1000 + index),
            "question": "What shade" + " exactly" * (index % 3) + "?",
            "image": {"bytes": png(10 + index // 2), "path": None},
            "docId": index // 2,
            "answers": [f"shade {10 + index // 2}"],
        }
        for index in range(count)
    ]


def chart_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "type": "human_test" if index < count // 2 else "augmented_test",
            "question": f"How much is bar {index}?",
            "answer": str(40 + index),
            "image": {"bytes": png(40 + index), "path": None},
        }
        for index in range(count)
    ]


class Reader:
    """Stands in for a model: reads the shade of the image, and counts what it was asked."""

    def __init__(self, word: str = "shade ", stop_after: int | None = None) -> None:
        self.word, self.stop_after = word, stop_after
        self.batches: list[list[str]] = []

    def length(self, question: str, sizes_hw: Sequence[tuple[int, int]]) -> int:
        return len(question) + 100 * len(sizes_hw)

    def shared_length(self, sizes_hw: Sequence[tuple[int, int]]) -> int:
        return 0

    def prepare(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        return list(questions), [list(own) for own in images]

    def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
        questions, images = prepared
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(questions)
        assert all(image.mode == "RGB" for own in images for image in own)
        return [f"{self.word}{np.asarray(own[0])[0, 0, 0]}" if own else "nothing" for own in images]


def run(
    rows: list[dict[str, Any]],
    output: Path,
    benchmark: Any = DOCVQA,
    reader: Reader | None = None,
    **options: Any,
) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    table = Rows(rows, "memory")
    result = evaluate(
        benchmark, table, reader or Reader(), RunOptions(**options), output, lines.append
    )
    return result, lines


# ---- benchmarks


def test_prompts_are_the_benchmarks_own() -> None:
    document = DOCVQA.sample(0, document_rows(1)[0])
    chart = CHARTQA.sample(0, chart_rows(1)[0])
    assert document.prompt == "What shade?\nAnswer the question using a single word or phrase."
    assert chart.prompt == "How much is bar 0?\nAnswer the question with a single word."
    assert (DOCVQA.max_new_tokens, CHARTQA.max_new_tokens) == (32, 16)
    assert (DOCVQA.split, CHARTQA.split) == ("validation", "test")
    assert document.question_id == "1000" and chart.question_id == "0"


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(CommandError, match=r"unknown task 'docvq': did you mean 'docvqa'"):
        select("chartqa,docvq")
    with pytest.raises(CommandError, match="names no task"):
        select(" , ")
    assert [task.name for task in select("chartqa, docvqa,chartqa")] == ["chartqa", "docvqa"]


def test_unknown_control_names_the_nearest() -> None:
    with pytest.raises(CommandError, match="did you mean 'blank-images'"):
        check_control("blank")


def test_chart_scores_of_both_halves(tmp_path: Path) -> None:
    rows = chart_rows(6)
    rows[0]["answer"] = "7"
    result, _ = run(rows, tmp_path, CHARTQA, Reader(word=""))
    values = {name: entry["value"] for name, entry in result["scores"].items()}
    assert values == {
        "relaxed_overall": pytest.approx(5 / 6),
        "relaxed_human_split": pytest.approx(2 / 3),
        "relaxed_augmented_split": 1.0,
    }
    assert [entry["samples"] for entry in result["scores"].values()] == [6, 3, 3]


# ---- running


def test_every_sample_has_one_line_with_its_evidence(tmp_path: Path) -> None:
    result, _ = run(document_rows(10), tmp_path, batch_size=4)
    records = read_records(tmp_path / "docvqa.jsonl")
    assert sorted(record["index"] for record in records) == list(range(10))
    hashes = [record.pop("image_hash") for record in sorted(records, key=lambda r: r["index"])]
    assert hashes[::2] == hashes[1::2] and len(set(hashes)) == 5  # one page for two questions
    first = next(record for record in records if record["index"] == 3)
    assert first == {
        "index": 3,
        "question_id": "1003",
        "question": "What shade?",
        "prompt": "What shade?\nAnswer the question using a single word or phrase.",
        "references": ["shade 11"],
        "answer": "shade 11",
        "score": 1.0,
        "kind": None,
        "document": "1",
        "image_index": 3,
        "details": {},
        "error": None,
    }
    assert result["scores"]["anls"]["value"] == 1.0
    assert (result["samples"], result["failed"]) == (10, 0)


def test_batches_are_sorted_by_length() -> None:
    table = Rows(document_rows(9), "memory")
    items, _ = make_items(DOCVQA, table, range(9), Reader())
    batches = make_batches(items, 4)
    lengths = [item.length for batch in batches for item in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert make_batches(items[::-1], 4) == batches


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    rows, whole, parts = document_rows(23), tmp_path / "whole", tmp_path / "parts"
    expected, _ = run(rows, whole, batch_size=3)
    for stop_after in (2, 0, 3):
        with pytest.raises(KeyboardInterrupt):
            run(rows, parts, reader=Reader(stop_after=stop_after), batch_size=3)
    path = parts / "docvqa.jsonl"
    assert len(read_records(path)) == 15
    with path.open("a", encoding="utf-8") as stream:  # killed in the middle of a line
        stream.write('{"index": 22, "ques')
    reader = Reader()
    result, lines = run(rows, parts, reader=reader, batch_size=3)
    assert "resuming, 15 of 23 samples" in lines[0]
    assert sum(map(len, reader.batches)) == 8
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    by_index = lambda record: record["index"]  # noqa: E731
    assert sorted(read_records(path), key=by_index) == sorted(
        read_records(whole / "docvqa.jsonl"), key=by_index
    )


def test_a_batch_that_was_half_written_is_asked_again_whole(tmp_path: Path) -> None:
    rows = document_rows(8)
    run(rows, tmp_path, batch_size=4)
    path = tmp_path / "docvqa.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:6]), encoding="utf-8")
    reader = Reader()
    result, _ = run(rows, tmp_path, reader=reader, batch_size=4)
    assert [len(batch) for batch in reader.batches] == [4]
    assert result["samples"] == len(read_records(path)) == 8


def test_changed_data_is_noticed_when_resuming(tmp_path: Path) -> None:
    rows = document_rows(4)
    run(rows, tmp_path)
    rows[2]["answers"] = ["another"]
    with pytest.raises(CommandError, match="row 2 is another question now"):
        run(rows, tmp_path)


@pytest.mark.parametrize("control", [None, "shuffled-images"])
def test_changed_images_are_noticed_when_resuming(tmp_path: Path, control: str | None) -> None:
    rows = document_rows(6)
    run(rows, tmp_path, control=control)
    rows[2]["image"] = {"bytes": png(200), "path": None}
    rows[3]["image"] = {"bytes": png(200), "path": None}
    with pytest.raises(CommandError, match="shows another image, the data has changed"):
        run(rows, tmp_path, control=control)


def test_only_the_size_of_a_blank_image_matters_when_resuming(tmp_path: Path) -> None:
    rows = document_rows(4)
    for control in ("blank-images", "question-only"):
        run(rows, tmp_path / control, control=control)
    rows[2]["image"] = {"bytes": png(200), "path": None}
    for control in ("blank-images", "question-only"):
        _, lines = run(rows, tmp_path / control, control=control)
        assert "resuming, 4 of 4" in lines[0]
    rows[2]["image"] = {"bytes": png(200, (21, 30)), "path": None}
    with pytest.raises(CommandError, match="row 2 is another question now"):
        run(rows, tmp_path / "blank-images", control="blank-images")


def test_records_from_before_there_were_hashes_of_images_are_taken_up(tmp_path: Path) -> None:
    run(document_rows(4), tmp_path)
    path = tmp_path / "docvqa.jsonl"
    records = read_records(path)
    for record in records:
        del record["image_hash"]
    rewrite_records(path, records[:3])
    reader = Reader()
    result, lines = run(document_rows(4), tmp_path, reader=reader)
    assert "resuming, 3 of 4" in lines[0]
    assert result["scores"]["anls"]["value"] == 1.0


def test_half_a_surrogate_pair_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = document_rows(3)
    rows[0]["question"] = "What \ud83d shade \U0001f600?"
    rows[1]["question"] = "W\xe4s?"
    run(rows, tmp_path)
    path = tmp_path / "docvqa.jsonl"
    assert "W\xe4s?" in path.read_text("utf-8")  # only what cannot be written is escaped
    reader = Reader()
    result, _ = run(rows, tmp_path, reader=reader)
    assert not reader.batches and result["failed"] == 0
    assert read_records(path)[0]["question"] == rows[0]["question"]
    write_json(tmp_path / "results.json", {"errors": [rows[0]["question"]]})
    kept = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert kept == {"errors": [rows[0]["question"]]}


@pytest.mark.parametrize(
    ("line", "key"), [('{"a": 1}', "index"), ("[1]", "index"), ('{"index": 0}', "question_id")]
)
def test_a_file_of_something_else_is_named(tmp_path: Path, line: str, key: str) -> None:
    (tmp_path / "docvqa.jsonl").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(CommandError, match=rf"docvqa\.jsonl, line 1 is no record .*'{key}'"):
        run(document_rows(2), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fitting": "4"}', '{"fitting": 0}', "\udcff"])
def test_a_damaged_file_of_the_memory_that_was_found_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "docvqa.memory.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CommandError, match=r"docvqa\.memory\.json is damaged .*delete it"):
        run(document_rows(2), tmp_path)
    write_json(path, {"fitting": 2})
    assert run(document_rows(2), tmp_path)[0]["failed"] == 0


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run(document_rows(4), tmp_path)
    path = tmp_path / "docvqa.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], "{oops\n", *lines[2:]]), encoding="utf-8")
    with pytest.raises(CommandError, match=r"docvqa\.jsonl, line 2 is damaged"):
        run(document_rows(4), tmp_path)


def test_other_settings_do_not_mix(tmp_path: Path) -> None:
    settings = {"weights": "a", "batch_size": 4, "control": None}
    open_output(tmp_path, settings)
    open_output(tmp_path, settings)
    with pytest.raises(CommandError, match="holds a run with batch_size 4, this one has 8"):
        open_output(tmp_path, {**settings, "batch_size": 8})
    (tmp_path / "docvqa.jsonl").write_text("old", encoding="utf-8")
    open_output(tmp_path, {**settings, "batch_size": 8}, overwrite=True)
    assert not (tmp_path / "docvqa.jsonl").exists()
    (tmp_path / "settings.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CommandError, match=r"settings\.json is damaged .* --overwrite"):
        open_output(tmp_path, settings)


def test_a_setting_that_one_run_does_not_name_is_none_there(tmp_path: Path) -> None:
    plain, reduced = {"weights": "a"}, {"weights": "a", "reduction": {"method": "fastv"}}
    open_output(tmp_path / "a", reduced)
    with pytest.raises(CommandError, match=r"with reduction {'method': 'fastv'}, this .* None"):
        open_output(tmp_path / "a", plain)
    open_output(tmp_path / "b", plain)
    with pytest.raises(CommandError, match=r"with reduction None, this .* {'method': 'fastv'}"):
        open_output(tmp_path / "b", reduced)
    open_output(tmp_path / "b", {**plain, "reduction": None})  # as newer code may write it
    open_output(tmp_path / "c", {**plain, "reduction": None})
    open_output(tmp_path / "c", plain)


def test_bad_samples_count_as_wrong_and_the_run_goes_on(tmp_path: Path) -> None:
    rows = document_rows(8)
    rows[1]["answers"] = []
    rows[0]["image"] = {"bytes": None, "path": "../outside.png"}
    (tmp_path.parent / "outside.png").write_bytes(png(10))
    rows[2]["image"] = {"bytes": None, "path": "missing.png"}
    rows[3]["image"] = {"bytes": b"no image at all", "path": None}
    whole = png(77, (400, 300))
    rows[4]["image"] = {"bytes": whole[: len(whole) // 2], "path": None}  # the header is good
    rows[5]["question"] = None
    del rows[6]["image"], rows[7]["questionId"]
    result, _ = run(rows, tmp_path, batch_size=3)
    assert result["failed"] == 7
    assert result["scores"]["anls"] == {
        "value": pytest.approx(1 / 8),
        "interval": result["scores"]["anls"]["interval"],
        "samples": 8,
    }
    errors = {line.split(":")[0]: line for line in result["errors"]}
    assert "'answers' holds []" in errors["1001"]
    assert "'../outside.png' leads out of" in errors["1000"]
    assert "missing.png cannot be read" in errors["1002"]
    assert "15 bytes is not an image" in errors["1003"] and "cannot be decoded" in errors["1004"]
    assert "'question' holds None" in errors["1005"]
    assert "row 6 has no image" in errors["1006"]
    rows[2] = document_rows(8)[2]  # mended: only failed samples are tried again
    result, _ = run(rows, tmp_path, batch_size=3)
    assert result["failed"] == 6


def test_limit_says_what_it_leaves_out(tmp_path: Path) -> None:
    result, lines = run(chart_rows(8), tmp_path / "a", CHARTQA, limit=4)
    assert result["samples"] == 4
    assert "leaves out every row of augmented_test" in lines[0]
    _, lines = run(chart_rows(8), tmp_path / "b", CHARTQA, limit=6)
    assert not lines
    with pytest.raises(CommandError, match="--limit 0"):
        RunOptions(limit=0)
    with pytest.raises(CommandError, match="--batch-size -1"):
        RunOptions(batch_size=-1)


# ---- controls


def test_shuffled_images_show_another_document(tmp_path: Path) -> None:
    result, _ = run(document_rows(12), tmp_path, control="shuffled-images")
    assert result["scores"]["anls"]["value"] < 1.0
    records = read_records(tmp_path / "docvqa.jsonl")
    assert all(record["image_index"] // 2 != record["index"] // 2 for record in records)
    assert sorted(record["image_index"] for record in records) == list(range(12))
    assert all(record["answer"] == f"shade {10 + record['image_index'] // 2}" for record in records)


def test_blank_images_are_grey_and_of_the_same_size(tmp_path: Path) -> None:
    seen: list[Image.Image] = []

    class Keeper(Reader):
        def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
            seen.extend(image for own in prepared[1] for image in own)
            return super().generate(prepared, max_new_tokens)

    run(document_rows(3), tmp_path, reader=Keeper(), control="blank-images")
    assert {image.size for image in seen} == {(30, 20)}
    assert {image.getpixel((5, 5)) for image in seen} == {(128, 128, 128)}


def test_question_only_shows_no_image(tmp_path: Path) -> None:
    rows = document_rows(3)
    rows[0]["image"] = None
    result, _ = run(rows, tmp_path, control="question-only")
    assert result["failed"] == 0
    answers = [record["answer"] for record in read_records(tmp_path / "docvqa.jsonl")]
    assert answers == ["nothing"] * 3


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 3))
def test_derangement_never_meets_its_own_document(owners: list[int], seed: int) -> None:
    keys = [[f"document {owner}"] for owner in owners]
    if 2 * max(map(owners.count, owners)) > len(owners):
        with pytest.raises(ValueError, match="about one document"):
            derange(keys, seed)
        return
    partner = derange(keys, seed)
    assert sorted(partner) == list(range(len(owners)))
    assert all(owners[place] != owners[other] for place, other in enumerate(partner))
    assert partner == derange(keys, seed)


def test_equal_images_of_different_documents_are_one_document() -> None:
    keys = [["a", "x"], ["b", "x"], ["b", "y"], ["c", "z"], ["d", "w"], ["e", "v"]]
    for seed in range(20):
        partner = derange(keys, seed)
        assert not set(partner[:3]) & {0, 1, 2}


# ---- sources


def save_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(str(path))


def test_parquet_saved_and_json_folders_hold_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    rows = document_rows(4)
    save_parquet(tmp_path / "a/docvqa/data/validation-00000-of-00001.parquet", rows)
    save_parquet(tmp_path / "a/docvqa/data/test-00000-of-00001.parquet", rows[:1])
    table = Dataset.from_list(rows).cast_column("image", ImageFeature())
    DatasetDict({"validation": table}).save_to_disk(str(tmp_path / "b/docvqa"))
    (tmp_path / "c/docvqa/images").mkdir(parents=True)
    for index, row in enumerate(rows):
        (tmp_path / f"c/docvqa/images/{index}.png").write_bytes(row["image"]["bytes"])
    listed = [{**row, "image": f"images/{index}.png"} for index, row in enumerate(rows)]
    (tmp_path / "c/docvqa/validation.json").write_text(json.dumps(listed), encoding="utf-8")
    for name in "abc":
        loaded = load_rows(DOCVQA, tmp_path / name)
        assert len(loaded) == 4
        for index, row in enumerate(rows):
            [image] = row_images(DOCVQA, loaded, index)
            assert image.content() == row["image"]["bytes"]
            assert DOCVQA.sample(index, loaded[index]) == DOCVQA.sample(index, row)


def test_lines_of_json_end_at_line_feeds_only(tmp_path: Path) -> None:
    """Other characters that end a line for Python stand in texts of web pages."""
    texts = [f"one{mark}two" for mark in ("\u2028", "\u2029", "\x85", "")]
    rows = [
        {**row, "image": "x.png", "question": text}
        for row, text in zip(document_rows(4), texts, strict=True)
    ]
    (tmp_path / "docvqa").mkdir()
    for end in ("\n", "\r\n"):
        lines = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "docvqa/validation.jsonl").write_bytes(lines.encode())
        loaded = load_rows(DOCVQA, tmp_path)
        assert [loaded[index]["question"] for index in range(len(loaded))] == texts


def test_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "docvqa").mkdir()
    (tmp_path / "docvqa/validation.json").write_bytes('[{"question": "\xe9"}]'.encode("latin-1"))
    with pytest.raises(CommandError, match=r"validation\.json: not valid JSON .*utf-8"):
        load_rows(DOCVQA, tmp_path)


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        # The same rows in two forms are asked once, from the first place.
        ({"validation": 3, "data/validation-00000-of-00001": 4}, 3),
        ({"data/validation-0": 4, "DocVQA/validation": 5}, 4),
        ({"validation": 3, "validation-00000-of-00001": 4}, 3),
        # A part that is named after the split is another one.
        ({"validation": 3, "validation_lite": 2}, 3),
        ({"validation-00000-of-00001": 3, "validation_lite-00000-of-00001": 2}, 3),
        ({"validation-00000-of-00001": 3, "validation-00000-of-00001-lite": 2}, 3),
        # All parts count, also with the hash of older uploads.
        ({"data/validation-00000-of-00002": 3, "data/validation-00001-of-00002": 2}, 5),
        ({"data/validation-00000-of-00001-f0ed6b9b8ffc7ee1": 3, "data/test-00000-of-00001": 1}, 3),
        # Files without the name of any split are taken for the only one.
        ({"part-0": 1, "part-1": 2}, 3),
        ({"validation_lite": 2}, None),
    ],
)
def test_one_form_of_a_split_is_taken(
    tmp_path: Path, files: dict[str, int], taken: int | None
) -> None:
    for name, count in files.items():
        save_parquet(tmp_path / f"docvqa/{name}.parquet", document_rows(count))
    if taken is None:
        with pytest.raises(CommandError, match=r"needed is validation\.parquet"):
            load_rows(DOCVQA, tmp_path)
    else:
        assert len(load_rows(DOCVQA, tmp_path)) == taken


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_a_missing_column_is_named(tmp_path: Path, form: str) -> None:
    rows = [{key: row[key] for key in row if key != "answers"} for row in document_rows(2)]
    if form == "parquet":
        save_parquet(tmp_path / "docvqa/validation.parquet", rows)
    else:
        (tmp_path / "docvqa").mkdir()
        listed = [{**row, "image": "x.png"} for row in rows]
        (tmp_path / "docvqa/rows.json").write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(CommandError, match=r"lacks the column 'answers' \(it has 'docId'"):
        load_rows(DOCVQA, tmp_path)


def test_another_split_is_never_taken_instead(tmp_path: Path) -> None:
    save_parquet(tmp_path / "docvqa/train.parquet", document_rows(2))
    with pytest.raises(CommandError, match="no parquet file of the split 'validation'"):
        load_rows(DOCVQA, tmp_path)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="nowhere: no such folder"):
        load_rows(DOCVQA, tmp_path / "nowhere")
    (tmp_path / "chartqa").mkdir()
    with pytest.raises(CommandError, match=r"no folder 'docvqa' in it \(folders found: chartqa\)"):
        load_rows(DOCVQA, tmp_path)
    with pytest.raises(CommandError, match="holds no JSON files and no parquet"):
        load_rows(CHARTQA, tmp_path)
    (tmp_path / "chartqa/test.json").write_text("{", encoding="utf-8")
    with pytest.raises(CommandError, match="not valid JSON"):
        load_rows(CHARTQA, tmp_path)


def test_no_hub_says_so_and_names_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CommandError) as caught:
        load_rows(DOCVQA)
    for part in ("cannot be reached", "lmms-lab-encoder/DocVQA", "--data DIR", "proxyv.synthetic"):
        assert part in str(caught.value)


def test_offline_mode_does_not_try_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(CommandError, match="HF_HUB_OFFLINE=1 and no earlier download"):
        load_rows(CHARTQA)


def test_the_former_owner_is_tried_second(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from datasets.exceptions import DatasetNotFoundError

    tried = []

    def load(repository: str, config: str | None, split: str) -> Dataset:
        tried.append((repository, config, split))
        if repository.startswith("lmms-lab-encoder"):
            raise DatasetNotFoundError("gone")
        return Dataset.from_list(document_rows(2))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert load_rows(DOCVQA).origin == "hub:lmms-lab/DocVQA/validation"
    assert tried == [
        ("lmms-lab-encoder/DocVQA", "DocVQA", "validation"),
        ("lmms-lab/DocVQA", "DocVQA", "validation"),
    ]


ASK_THE_HUB = """
import sys
from proxyv.cli import CommandError
from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.eval.sources import load_rows

for name in sys.argv[1:]:
    try:
        load_rows(BENCHMARKS[name])
    except CommandError as error:
        print(name, " ".join(str(error).split()))
"""


def test_a_hub_that_fails_is_asked_for_the_former_owner_too(tmp_path: Path) -> None:
    """The real client against a server on this machine that refuses, forbids and hangs up."""
    faults = {"DocVQA": 401, "ChartQA": 403, "GQA": None}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status = next((code for name, code in faults.items() if name in self.path), 200)
            if status is None:
                self.connection.close()
                return
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {name: "" for name in os.environ if name.endswith("_OFFLINE")}
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
    names = ["docvqa", "chartqa", "gqa"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_THE_HUB, *names],
            env={
                **os.environ,
                **online,
                **address,
                "HF_HOME": str(tmp_path),
                "no_proxy": "127.0.0.1",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.keys() == set(names)
    for name in names:
        for repository in BENCHMARKS[name].repositories:
            assert any(repository in path for path in asked)
            assert f"{repository}: " in lines[name]
        assert f"give --data DIR with the folder DIR/{name}" in lines[name]


def test_json_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep/results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text("utf-8")) == {"a": 1}


# ---- with a model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), image_aspect_ratio="anyres")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents and charts of different sizes, and so of different numbers of crops."""
    folder = tmp_path_factory.mktemp("world")
    documents, charts = document_rows(10), chart_rows(6)
    for index, row in enumerate([*documents, *charts]):
        row["image"]["bytes"] = png(8 * index, ((20, 60), (60, 20), (70, 70))[index % 3])
    save_parquet(folder / "docvqa/validation.parquet", documents)
    save_parquet(folder / "chartqa/test.parquet", charts)
    return folder


def random_image(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_batched_answers_equal_answers_one_by_one(model_folder: Path) -> None:
    answerer = Answerer.load(str(model_folder), dtype="float32", device="cpu")
    pictures = [random_image(40, 80), random_image(30, 30), random_image(100, 20)]
    questions = ["What?", "What is written at the top?", "How much <|user|> is it?", "Why?", "No"]
    images: list[list[Image.Image]] = [[pictures[0]], [pictures[1]], [], pictures, [pictures[2]]]
    together = answerer.generate(answerer.prepare(questions, images), 12)
    alone = [
        answerer.generate(answerer.prepare([question], [own]), 12)[0]
        for question, own in zip(questions, images, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 2
    for question, own in zip(questions, images, strict=True):
        length = answerer.length(question, [(image.height, image.width) for image in own])
        inputs = answerer.inputs([[{"role": "user", "content": question}]], [[]])
        assert length >= inputs["input_ids"].shape[1] + 17 * len(own)


def test_a_question_with_image_marks_gets_no_more_of_them(model_folder: Path) -> None:
    assert user_message("Why?", 2)["content"] == "<image> <image>\nWhy?"
    assert user_message("Why?", 0)["content"] == "Why?"
    assert user_message("Is <image> darker?", 1)["content"] == "Is <image> darker?"
    answerer = Answerer.load(str(model_folder), dtype="float32", device="cpu")
    image = random_image(40, 80)
    plain = answerer.length("Is  darker?", [(40, 80)])
    marked = answerer.length("Is <image> darker?", [(40, 80)])
    assert abs(plain - marked) <= 2  # the same image once, another place of white space
    assert len(answerer.generate(answerer.prepare(["Is <image> darker?"], [[image]]), 2)) == 1
    with pytest.raises(ValueError, match="1 <image> mark but there are 2 images"):
        answerer.length("Is <image> darker?", [(40, 80), (40, 80)])


def test_a_question_that_is_no_unicode_text_fails_alone(model_folder: Path, tmp_path: Path) -> None:
    answerer = Answerer.load(str(model_folder), dtype="float32", device="cpu")
    rows = document_rows(2)
    rows[0]["question"] = "What \ud83d?"
    result = evaluate(
        DOCVQA, Rows(rows, "memory"), answerer, RunOptions(), tmp_path, lambda _: None
    )
    assert result["failed"] == 1 and "1000: the question is not Unicode" in result["errors"][0]
    assert read_records(tmp_path / "docvqa.jsonl")[0]["question"] == rows[0]["question"]


def test_fingerprints_follow_weights_of_every_form(tmp_path: Path) -> None:
    def of(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        return fingerprint(folder)

    alone = "757006fd52e36aed"  # of the folder with this config.json alone, as it always was
    assert of() == alone
    assert of(training_args__bin="a", optimizer__bin="b", results__json="c") == alone
    for name in ("pytorch_model", "pytorch_model-00001-of-00002", "adapter_model"):
        assert len({alone, of(**{f"{name}__bin": "one"}), of(**{f"{name}__bin": "two"})}) == 3
    for name in ("vocab__json", "merges__txt"):
        assert len({alone, of(**{name: "one"}), of(**{name: "two"})}) == 3


def test_rotated_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    stream = io.BytesIO()
    random_image(20, 50).save(stream, "JPEG", exif=exif)
    image = image_of_bytes(stream.getvalue(), "row 0")
    assert image.size_hw() == (50, 20) and image.load().size == (20, 50)


def test_commit_marks_changed_code_and_not_a_report_made_again(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code, report = tmp_path / "code/provenance.py", tmp_path / "docs/report.md"
    for file in (code, report):
        file.parent.mkdir()
    shutil.copy(provenance.__file__, code)
    report.write_text("1 s")
    spec = importlib.util.spec_from_file_location("copied", code)
    assert spec and spec.loader
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    git("init")
    assert copied.git_commit() is None  # not committed, so it is no commit's code
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    report.unlink()
    assert copied.git_commit() == commit
    code.write_text(code.read_text() + "\n")
    assert copied.git_commit() == f"{commit}+changes"


def test_command_writes_results_and_resumes(
    model_folder: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["--model", str(model_folder), "--data", str(world), "--output", str(output)]
    command += ["--batch-size", "3", "--device", "cpu"]
    assert main([*command, "--tasks", "docvqa,chartqa"]) == 0
    shown = capsys.readouterr().out
    assert "anls" in shown and "relaxed_overall" in shown
    results = json.loads((output / "results.json").read_text("utf-8"))
    assert list(results["tasks"]) == ["docvqa", "chartqa"]
    assert results["prompt_template"] == "tiny"
    told = {"dtype": "float32", "attention": "sdpa", "device": "cpu", "batch_size": 3}
    assert told.items() <= results["settings"].items()
    assert results["model"] == str(model_folder) and results["config"]["start_layer"] == 1
    assert {"torch", "transformers", "nltk", "python"} <= results["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", results["git_commit"] or "0" * 40)
    assert results["hardware"]["device"] and results["date"]
    lines = (output / "docvqa.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 10 and all(json.loads(line)["answer"] for line in lines)

    assert main([*command, "--tasks", "chartqa", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["tasks"]["docvqa"] == results["tasks"]["docvqa"]
    assert again["tasks"]["chartqa"]["scores"] == results["tasks"]["chartqa"]["scores"]

    other = [*command, "--tasks", "docvqa", "--control", "blank-images"]
    assert run_command(main, other) == 2
    assert "holds a run with control None" in capsys.readouterr().err


@pytest.mark.parametrize("control", ["shuffled-images", "blank-images", "question-only"])
def test_command_runs_every_control(
    model_folder: Path, world: Path, tmp_path: Path, control: str
) -> None:
    command = ["--model", str(model_folder), "--data", str(world), "--output", str(tmp_path)]
    assert main([*command, "--tasks", "docvqa", "--control", control]) == 0
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results["settings"]["control"] == control
    records = read_records(tmp_path / "docvqa.jsonl")
    shown = [record["image_index"] for record in records]
    own, hashes = list(range(10)), {record["image_hash"] for record in records}
    if control == "shuffled-images":  # two rows are of one document
        pairs = zip(shown, own, strict=True)
        assert sorted(shown) == own and all(a // 2 != b // 2 for a, b in pairs)
    elif control == "blank-images":  # named by their three sizes, not by their ten files
        assert shown == own and len(hashes) == 3
    else:
        assert shown == [None] * 10 and hashes == {None}


def test_command_reports_bad_samples_in_its_exit_code(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "image": f"{index}.png"} for index, row in enumerate(chart_rows(4))]
    (tmp_path / "chartqa").mkdir()
    (tmp_path / "chartqa/rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for index in (0, 1, 3):
        (tmp_path / f"chartqa/{index}.png").write_bytes(png(index))
    command = ["--model", str(model_folder), "--data", str(tmp_path), "--tasks", "chartqa"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert "2.png cannot be read" in shown and "1 samples could not be asked" in shown


def test_killed_command_resumes_with_the_same_result(
    model_folder: Path, world: Path, tmp_path: Path
) -> None:
    command = ["--model", str(model_folder), "--data", str(world), "--tasks", "docvqa"]
    command += ["--batch-size", "1", "--device", "cpu"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--output", str(whole)]) == 0
    path = parts / "docvqa.jsonl"
    run = [sys.executable, "-m", "proxyv.eval", *command, "--output", str(parts)]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and process.poll() is None:
            if path.is_file() and path.read_text("utf-8").count("\n") >= 3:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 3 <= path.read_bytes().count(b"\n") < 10  # not before and not after the questions
    assert main([*command, "--output", str(parts)]) == 0
    by_index = {record["index"]: record for record in read_records(path)}
    assert by_index == {record["index"]: record for record in read_records(whole / "docvqa.jsonl")}
    scores = [
        json.loads((folder / "results.json").read_text("utf-8"))["tasks"]["docvqa"]["scores"]
        for folder in (whole, parts)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder", "--tasks", "docvqa"], "no/such/folder: no such folder"),
        (["--model", "x", "--tasks", "chartqq"], "did you mean 'chartqa'"),
        (["--model", "x", "--tasks", "chartqa", "--control", "blank"], "unknown control"),
        (["--model", "x", "--tasks", "chartqa", "--limit", "0"], "--limit 0"),
        (["--model", "{model}", "--tasks", "chartqa", "--data", "nowhere"], "no such folder"),
        (["--model", "{world}", "--tasks", "chartqa", "--data", "{world}"], "no config.json"),
        (
            ["--model", "{model}", "--tasks", "chartqa", "--data", "{world}", "--dtype", "fp32"],
            "did you mean 'float32'",
        ),
        (
            ["--model", "{model}", "--tasks", "chartqa", "--data", "{world}", "--device", "gpu"],
            "--device gpu: unknown",
        ),
        (["raport", "x"], "unknown command 'raport': did you mean 'report'"),
    ],
)
def test_mistakes_are_explained_in_one_line(
    model_folder: Path,
    world: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    filled = [part.format(model=model_folder, world=world) for part in arguments]
    assert run_command(main, filled) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("error: ") and message in shown[-1]
    assert not any("Traceback" in line for line in shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_layer": 0}, r"start_layer=0 does not fit .* set it to 1"),
        ({"start_layer": None}, r"start_layer=None does not fit .* set it to 1"),
        ({"text_config": {"intermediate_size": 48}}, r"intermediate_size=48 does not fit"),
        ({"text_config": {"hidden_size": "wide"}}, r"invalid config\.json .*hidden_size"),
        ({"model_type": "clip"}, "a model of type 'clip', needed is 'proxyv'"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    model_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Answerer.load(str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json"])
def test_a_model_without_its_processor_says_what_is_missing(
    model_folder: Path, tmp_path: Path, file: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / file).unlink()
    with pytest.raises(CommandError, match=rf"{folder}: its processor or tokenizer.*{file}"):
        Answerer.load(str(folder), device="cpu")


def test_damaged_weights_are_named(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(CommandError, match="damaged weights"):
        Answerer.load(str(tmp_path))


def test_the_table_fits_eighty_columns() -> None:
    entry = {"value": 0.5, "interval": [0.4, 0.6], "samples": 12345}
    names = ("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split")
    task = {"scores": dict.fromkeys(names, entry), "failed": 12}
    results = {"model": "m", "settings": {"control": None}, "tasks": {"chartqa": task}}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(results))
    text = console.export_text()
    assert "…" not in text
    for part in (*names, "chartqa", "0.4000 .. 0.6000", "12345", "failed"):
        assert part in text


def test_transparent_parts_are_white_as_in_training() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, "PNG")
    image = image_of_bytes(buffer.getvalue(), "row 0").load()
    assert image.getpixel((0, 0)) == (255, 255, 255)
