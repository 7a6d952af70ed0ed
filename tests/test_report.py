"""Runs side by side: statistics against slow oracles, tables, and the page in a real browser."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from proxyv.cli import run_command
from proxyv.eval.__main__ import main
from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.eval.compare import compare, name_runs
from proxyv.eval.records import read_records, rewrite_records
from proxyv.eval.runner import summarise
from proxyv.eval.statistics import average_interval, bootstrap_interval, paired_difference
from proxyv.eval.stored import load_run
from proxyv.eval.tables import comparison_latex, comparison_markdown, comparison_table
from proxyv.files import write_json
from tests.test_benchmarks import picture, save_parquet

HOSTILE = "</script><script>document.title = 'owned'</script> 5% & \\x_y {a|b} *c*"

# ---- statistics


def exact_p(gaps: list[float]) -> float:
    """Every way of swapping the two scores of each question."""
    value = abs(np.mean(gaps))
    means = [
        abs(np.mean([sign * gap for sign, gap in zip(signs, gaps, strict=True)]))
        for signs in itertools.product((1, -1), repeat=len(gaps))
    ]
    return float(np.mean([mean >= value - 1e-12 for mean in means]))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_p_value_is_that_of_all_swaps(pairs: list[tuple[int, int]]) -> None:
    first, second = ([pair[side] / 4 for pair in pairs] for side in (0, 1))
    found = paired_difference([first], [second])
    assert found.p_value == pytest.approx(exact_p(list(np.subtract(first, second))), abs=0.025)
    assert found.value == pytest.approx(np.mean(first) - np.mean(second))
    assert found.changed == sum(a != b for a, b in pairs)
    turned = paired_difference([second], [first])
    assert turned.p_value == pytest.approx(found.p_value)
    assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=1e-9)


def test_no_p_value_is_zero() -> None:
    """The swaps as they are count as one of those drawn."""
    assert paired_difference([[1.0] * 40], [[0.0] * 40]).p_value == 1 / 10_001


def test_chance_differences_are_rarely_significant() -> None:
    generator = np.random.default_rng(0)
    values = [
        paired_difference([generator.random(40)], [generator.random(40)]).p_value for _ in range(60)
    ]
    assert np.mean([value < 0.05 for value in values]) <= 0.12


def test_average_of_tasks_counts_each_task_once() -> None:
    large, small = [1.0, 0.0] * 500, [1.0, 1.0, 0.0, 0.0]
    low, high = average_interval([large, small])
    alone = bootstrap_interval(small)
    assert alone[0] < low < 0.5 < high < alone[1]
    found = paired_difference([large, [1.0] * 4], [large, [0.0] * 4])
    assert found.value == 0.5 and found.changed == 4


def test_pairs_need_the_same_questions() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([[1.0, 0.0]], [[1.0]])
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([], [])


# ---- runs


def store(folder: Path, answers: list[str], **settings: Any) -> Path:
    """A finished run of ChartQA whose answers should be 40, 41, ... , and of SEED-Bench."""
    charts = [
        record(index, answer, str(40 + index), ("human_test", "augmented_test")[index % 2])
        for index, answer in enumerate(answers)
    ]
    for entry in charts:
        entry["score"] = BENCHMARKS["chartqa"].score(entry["answer"], entry["references"])
    tasks = {"chartqa": summarise(BENCHMARKS["chartqa"], charts)}
    tasks["chartqa"]["data_folder"] = str(folder.parent / "data")
    rewrite_records(folder / "chartqa.jsonl", charts)
    results = {"model": "some/model", "tasks": tasks, "settings": {"control": None, **settings}}
    write_json(folder / "results.json", results)
    return folder


def record(index: int, answer: str, reference: str, kind: str) -> dict[str, Any]:
    return {
        "index": index,
        "question_id": str(index),
        "question": f"How much is bar {index}?",
        "prompt": "p",
        "references": [reference],
        "answer": answer,
        "score": 0.0,
        "kind": kind,
        "document": None,
        "image_index": index,
        "details": {},
        "error": None,
    }


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run that is always right, one that is wrong in all human questions but one."""
    right = [str(40 + index) for index in range(30)]
    worse = [HOSTILE if index % 2 == 0 else answer for index, answer in enumerate(right)]
    worse[0] = right[0]
    rows = [
        {"type": "human_test", "question": "q", "answer": "1", "image": picture(30 + index, 20)}
        for index in range(30)
    ]
    save_parquet(tmp_path / "data/chartqa/test.parquet", rows)
    return [store(tmp_path / "base", right), store(tmp_path / "other", worse)]


def test_names_are_the_shortest_that_differ() -> None:
    assert name_runs([Path("/a/x/eval"), Path("/a/y/eval")]) == ["x/eval", "y/eval"]
    assert name_runs([Path("/a/one"), Path("/b/two")]) == ["one", "two"]
    assert len(set(name_runs([Path("/a"), Path("/a")]))) == 2


def test_comparison_has_scores_categories_and_differences(runs: list[Path]) -> None:
    found = compare([load_run(run) for run in runs])
    rows = {row.score: row for row in found.rows}
    assert next(iter(rows)) == "relaxed_overall"
    assert [cell.value for cell in rows["relaxed_human_split"].cells] == [1.0, 1 / 15]
    (gap,) = rows["relaxed_overall"].differences
    assert gap.value == pytest.approx(-14 / 30) and gap.changed == 14 and gap.p_value < 0.001
    (none,) = rows["relaxed_augmented_split"].differences
    assert none.value == 0.0 and none.p_value == 1.0
    kinds = {row.score: [cell.value for cell in row.cells] for row in found.categories}
    assert kinds == {"augmented_test": [1.0, 1.0], "human_test": [1.0, 1 / 15]}


def test_other_questions_are_not_paired(runs: list[Path], tmp_path: Path) -> None:
    short = store(tmp_path / "short", ["40"] * 5)
    found = compare([load_run(run) for run in (*runs, short)])
    assert found.rows[0].differences[0] is not None and found.rows[0].differences[1] is None
    assert "short was not asked the same questions as base" in found.notes[0]


def test_tables_escape_and_mark_the_best(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "50%_a|b")
    found = compare([load_run(run) for run in (runs[0], tmp_path / "50%_a|b")])
    latex, markdown = comparison_latex(found), comparison_markdown(found)
    assert r"50\%\_a|b" in latex and r"50%_a\|b" in markdown
    assert r"\textbf{1.0000 (1.0000 to 1.0000)} & 0.5333" in latex
    assert "**1.0000 (1.0000 to 1.0000)** | 0.5333" in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(comparison_table(found, found.rows, "scores"))
    assert found.rows[0].score in console.export_text()  # values wrap, names do not
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in body}) == 1


def test_lower_is_better_for_distances(tmp_path: Path) -> None:
    for name, answer in (("near", "one two three four"), ("far", "nothing of it")):
        entry = record(0, answer, "one two three four", "page")
        rewrite_records(tmp_path / name / "ccpdf.jsonl", [entry])
        task = summarise(BENCHMARKS["ccpdf"], [entry])
        write_json(tmp_path / name / "results.json", {"model": "m", "tasks": {"ccpdf": task}})
    found = compare([load_run(tmp_path / "near"), load_run(tmp_path / "far")])
    row = next(row for row in found.rows if row.score == "doc_edit_distance")
    assert row.best == row.cells[0].value == 0.0
    assert "doc_edit_distance (lower is better) | **0.0000" in comparison_markdown(found)


def test_command_writes_all_forms(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "relaxed_overall" in shown.out.replace("\n", "") and "written: " in shown.err
    page = (output / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 30
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # needs no other file
    assert HOSTILE not in page
    assert (output / "report.md").is_file() and (output / "report.tex").is_file()
    assert main(["report", *map(str, runs), "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [row] = [row for row in found["rows"] if row["score"] == "relaxed_overall"]
    stored = [json.loads((run / "results.json").read_text("utf-8")) for run in runs]
    scores = [each["tasks"]["chartqa"]["scores"]["relaxed_overall"]["value"] for each in stored]
    assert [cell["value"] for cell in row["cells"]] == pytest.approx(scores)


def test_page_without_pictures_says_why(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "data")
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "r")]) == 0
    assert "chartqa: the page shows no pictures (--data" in capsys.readouterr().err


def pictures_by_row(place: Path, *folders: Path) -> dict[int, int]:
    """How many pictures the page of these runs has of each row."""
    assert main(["report", *map(str, folders), "--output", str(place)]) == 0
    page = (place / "report.html").read_text("utf-8")
    [data] = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    return {each["row"]: len(each["pictures"]) for each in json.loads(data)["samples"]}


def test_pictures_are_those_that_were_asked_about(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 3 has another picture now; a control's hashes are of other pictures, and tell nothing."""
    path = runs[0] / "chartqa.jsonl"
    records = read_records(path)
    for entry in records:
        file = picture(30 + entry["index"], 20)["bytes"]
        names = hashlib.sha256(file).hexdigest()
        entry["image_hash"] = hashlib.sha256(names.encode()).hexdigest()[:16]
    records[3]["image_hash"] = "of another one"
    rewrite_records(path, records)
    blank = store(tmp_path / "blank", ["1"] * 30, control="blank-images")
    rewrite_records(blank / "chartqa.jsonl", [r | {"image_hash": "of sizes"} for r in records])
    assert pictures_by_row(tmp_path / "r", blank, runs[0]) == {
        index: int(index != 3) for index in range(30)
    }
    told = " ".join(capsys.readouterr().err.split())
    assert "chartqa: samples whose data has changed have no picture (row 3 of" in told


def test_rows_that_the_data_lacks_have_no_picture(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"type": "human_test", "question": "q", "answer": "1", "image": picture(30, 20)}
    save_parquet(tmp_path / "data/chartqa/test.parquet", [row] * 20)
    found = pictures_by_row(tmp_path / "r", runs[0])
    assert found == {index: int(index < 20) for index in range(30)}
    told = " ".join(capsys.readouterr().err.split())
    assert "has 20 rows, row 20 was asked)" in told and told.count("no picture") == 1


def test_mistakes_are_explained_in_one_line(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert run_command(main, ["report", str(tmp_path)]) == 2
    assert "no results.json, so no finished run" in capsys.readouterr().err
    assert run_command(main, ["report", str(runs[0]), "--samples", "-1"]) == 2
    assert "--samples -1" in capsys.readouterr().err
    (runs[0] / "results.json").write_text("{", encoding="utf-8")
    assert run_command(main, ["report", str(runs[0])]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_averages_of_groups_are_compared(tmp_path: Path) -> None:
    for name, boxes in (("good", ["[0.1, 0.1, 0.5, 0.5]"] * 4), ("bad", ["no box"] * 4)):
        tasks = {}
        for part in ("refcoco_testA", "refcoco_testB"):
            records = [record(i, box, "[0.1, 0.1, 0.5, 0.5]", "k") for i, box in enumerate(boxes)]
            for entry in records:
                entry["score"] = BENCHMARKS[part].score(entry["answer"], entry["references"])
            rewrite_records(tmp_path / name / f"{part}.jsonl", records)
            tasks[part] = summarise(BENCHMARKS[part], records)
        write_json(tmp_path / name / "results.json", {"model": "m", "tasks": tasks})
    found = compare([load_run(tmp_path / "good"), load_run(tmp_path / "bad")])
    row = found.rows[-1]
    assert (row.task, [cell.value for cell in row.cells]) == ("refcoco", [100.0, 0.0])
    assert row.differences[0].value == -100.0 and row.differences[0].p_value < 0.05


# ---- the page in a browser


def find_browser() -> str:
    """A Chromium: PROXYV_BROWSER, or one of the usual names."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    found = os.environ.get("PROXYV_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium found; name one in PROXYV_BROWSER")
    return found


def test_page_in_a_headless_browser(runs: list[Path], tmp_path: Path) -> None:
    automation = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    output = tmp_path / "report"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    errors: list[str] = []
    with automation.sync_playwright() as play:
        launcher = play.chromium
        browser = launcher.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda asked: errors.append(asked.url) if asked.url[:4] == "http" else 0)
        page.goto((output / "report.html").as_uri())
        assert page.title() == "base | other"  # the hostile answer ran nothing
        assert page.inner_text("#count") == "30 samples, page 1 of 2"
        first = page.locator("article").first
        assert "wrong" in first.inner_text() and "right" in first.inner_text()
        assert first.locator("pre.answer").nth(1).inner_text() == HOSTILE
        widths = page.evaluate(
            "Array.from(document.querySelectorAll('article img'), img => img.naturalWidth)"
        )
        assert len(widths) == 20 and widths[0] == 32  # row 2, the first disagreement
        for choice, count in (
            *(("disagree", 14), ("wrong", 14), ("right", 16), ("failed", 0)),
            *(("only0", 14), ("only1", 0)),
        ):
            page.select_option("#filter", choice)
            assert page.inner_text("#count").startswith(f"{count} samples")
            assert page.locator("article").count() == min(count, 20)
        page.select_option("#filter", "all")
        page.click("#forth")
        assert page.inner_text("#count") == "30 samples, page 2 of 2"
        assert page.locator("article").count() == 10
        page.fill("#search", "bar 17?")
        assert page.inner_text("#count") == "1 samples, page 1 of 1"
        assert page.locator("svg circle").count() == 6
        assert "-0.4667" in page.inner_text("#scores")
        browser.close()
    assert not errors


def test_page_data_is_valid_json(runs: list[Path], tmp_path: Path) -> None:
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "r")]) == 0
    page = (tmp_path / "r/report.html").read_text("utf-8")
    inside = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert inside is not None
    data = json.loads(inside.group(1))
    assert data["samples"][0]["answers"][1]["answer"] == HOSTILE
    assert set(data["pictures"]) == {key for each in data["samples"] for key in each["pictures"]}
