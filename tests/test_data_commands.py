"""check, inspect and bench on files that are really there, and really broken."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from proxyv.cli import run_command
from proxyv.data import check
from proxyv.data.__main__ import main
from proxyv.data.check import check_source
from proxyv.data.sources import open_source
from proxyv.train.stage0.tokenizer import build_tokenizer

LONG = "y" * 900
SAID = {"from": "gpt", "value": "A"}


def picture(colour: str, size=(40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def row(name: str, image: str | None, answer: str = "red", mark: str = "<image>\n", **more) -> dict:
    mark = mark if image else ""
    said = [{"from": "human", "value": f"{mark}What?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": said, **more}


ROWS = [
    row("good", "coco/a.png"),
    row("text", None),
    row("missing", "coco/gone.png"),
    row("corrupt", "sam/cut.png"),
    row("outside", "../secret.png"),
    row("huge", "sam/huge.png"),
    row("marks", "coco/a.png", mark="<image> <image>"),
    row("silent", "coco/a.png", answer=" "),
    row("long", "coco/a.png", answer=LONG),
    row("again", "coco/a.png"),
    row("copy", "sam/same.png", answer="another"),
    {"id": "nothing", "conversations": []},
    row("quiet", None, answer="q") | {"conversations": [{"from": "human", "value": "x" * 2000}]},
]
CLEAN = ["good", "text", "long", "copy"]


@pytest.fixture
def broken(tmp_path) -> list[str]:
    for folder in ("coco", "sam"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    root = tmp_path / "root"
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "sam" / "cut.png")
    whole = (root / "sam" / "cut.png").read_bytes()
    (root / "sam" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "coco" / "a.png").write_bytes(picture("red"))
    (root / "sam" / "same.png").write_bytes(picture("red"))
    (root / "sam" / "huge.png").write_bytes(picture("blue", (400, 300)))
    (tmp_path / "secret.png").write_bytes(picture("green"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return [
        *("--annotations", str(tmp_path / "rows.json"), "--images", str(root)),
        *("--tokenizer", str(tmp_path / "tokenizer"), "--template", "tiny", "--crop-px", "56"),
        *("--patch-size", "14", "--max-length", "200", "--max-megapixels", "0.1"),
    ]


FOUND = {
    "unreadable row": 2,
    "wrong number of images": 1,
    "missing image": 1,
    "corrupt image": 1,
    "image outside its folder": 1,
    "image too large": 1,
    "empty turn": 1,
    "repeated row": 1,
    "cut at the length limit": 1,
    "repeated image": 4,
}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_finds_every_fault_by_part(broken, capsys, workers):
    assert main(["check", *broken, "--workers", workers, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == len(ROWS)
    assert report["faults"] == FOUND
    assert report["clean"] == len(CLEAN)
    assert set(report["subsets"]) == {"coco", "sam", "text only", ".."}
    assert report["subsets"]["sam"]["faults"] == {
        "corrupt image": 1,
        "image too large": 1,
        "repeated image": 1,
    }
    assert sum(part["rows"] for part in report["subsets"].values()) == len(ROWS)
    assert "row 2 (id 'missing')" in report["examples"]["missing image"][0]
    assert "as row 0" in report["examples"]["repeated row"][0]


def test_check_prints_a_table_and_messages(broken, capsys):
    assert main(["check", *broken, "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "clean rows: 4 of 13" in out
    assert "no image file" in out and "(id 'corrupt')" in out
    plain = broken[:4]
    assert main(["check", *plain, "--workers", "0", "--fast"]) == 1
    assert "lengths were not checked" in capsys.readouterr().out


def test_the_clean_list_has_each_row_without_errors_once(broken, tmp_path, capsys):
    clean, numbers = tmp_path / "clean.jsonl", tmp_path / "clean.txt"
    main(["check", *broken, "--workers", "0", "--write-clean", str(clean)])
    main(["check", *broken, "--workers", "0", "--write-clean", str(numbers)])
    images = str(tmp_path / "root")
    source = open_source(str(clean), images)
    assert [source.record(i)["id"] for i in range(len(source))] == CLEAN
    (tmp_path / "mix.yaml").write_text(
        f"- {{annotations: {tmp_path}/rows.json, images: {images}, rows: {numbers}}}\n"
    )
    mixture = open_source(str(tmp_path / "mix.yaml"), None)
    assert [mixture.record(i)["id"] for i in range(len(mixture))] == CLEAN
    assert check_source(source, None).kinds == ["repeated image"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("a.csv", r"expected a name ending in \.txt or \.jsonl"),
        ("none/a.txt", r"none/a\.txt: no folder .*none; make it first"),
    ],
)
def test_a_list_that_cannot_be_written_is_refused_before_the_rows(
    broken, tmp_path, monkeypatch, name, error
):
    monkeypatch.setattr(check, "DataLoader", lambda *_, **__: pytest.fail("rows were looked at"))
    with pytest.raises((ValueError, OSError), match=error):
        main(["check", *broken, "--write-clean", str(tmp_path / name)])


def test_a_mixture_has_no_list_of_its_own(tmp_path):
    """Its sets have: numbers in one count within that set."""
    (tmp_path / "a.json").write_text(json.dumps([row("a", None, mark="")]))
    (tmp_path / "mix.yaml").write_text(f"- {{annotations: {tmp_path}/a.json}}\n")
    for ending in ("txt", "jsonl"):
        clean = str(tmp_path / f"clean.{ending}")
        with pytest.raises(ValueError, match=r"within each set of a mixture.*sets one by one"):
            main(["check", "--annotations", str(tmp_path / "mix.yaml"), "--write-clean", clean])


def test_the_report_is_there_though_the_list_cannot_be_written(broken, tmp_path, capsys):
    (tmp_path / "a.txt.partial").mkdir()  # in its place
    with pytest.raises(IsADirectoryError):
        main(["check", *broken, "--workers", "0", "--write-clean", str(tmp_path / "a.txt")])
    assert "clean rows: 4 of 13" in capsys.readouterr().out


def test_what_pad_would_make_too_large_is_found(tmp_path, capsys):
    (tmp_path / "wide.png").write_bytes(picture("red", (1200, 2)))
    (tmp_path / "rows.json").write_text(json.dumps([row("wide", "wide.png")]))
    words = ["check", "--annotations", str(tmp_path / "rows.json"), "--images", str(tmp_path)]
    words += ["--max-megapixels", "1", "--workers", "0", "--json"]
    for ratio, faults in (("anyres", {}), ("pad", {"image too large": 1})):
        assert main([*words, "--image-aspect-ratio", ratio]) == bool(faults)
        assert json.loads(capsys.readouterr().out)["faults"] == faults


def test_a_question_that_is_an_image_is_not_empty(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture("red"))
    asked = row("a", "a.png", mark="<image>")
    asked["conversations"][0]["value"] = "<image>"
    mute = {"id": "m", "conversations": [{"from": "human", "value": " "}, SAID]}
    (tmp_path / "rows.json").write_text(json.dumps([asked, mute]))
    words = ["--annotations", str(tmp_path / "rows.json"), "--images", str(tmp_path)]
    assert main(["check", *words, "--workers", "0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == {"empty turn": 1} and "(id 'm')" in str(report["examples"])


@pytest.mark.parametrize("words", [["--fast"], ["--json"], []])
def test_half_a_surrogate_pair_is_found_wherever_it_is(tmp_path, capsys, words):
    half = "x\ud83d"
    rows = [
        row("a", None),
        row("b", None, answer=half),
        row("c", half),
        row(half, None, answer="c"),
    ]
    rows += [row("e", None, answer="e", data_source=half), row("f", None, answer="f", note=half)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [*words, "--annotations", str(tmp_path / "rows.json"), "--workers", "0"]
    clean = tmp_path / "clean.jsonl"
    assert main(["check", *words, "--images", str(tmp_path), "--write-clean", str(clean)]) == 1
    said = capsys.readouterr().out
    said.encode()
    assert "(id 'b')" in said and "(id 'c')" in said and "unreadable row" in said
    kept = open_source(str(clean), str(tmp_path))
    assert [kept.record(number) for number in range(len(kept))] == [rows[0], *rows[3:]]


def test_rows_of_parquet_are_checked_and_listed_by_number(tmp_path, capsys):
    import datasets

    rows = [
        row("a", "x") | {"image": {"bytes": picture("red"), "path": None}, "data_source": "docvqa"},
        row("b", "x") | {"image": {"bytes": b"no", "path": None}, "data_source": "docvqa"},
        row("c", None) | {"data_source": "sharegpt"},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "0.parquet")
    command = ["check", "--annotations", str(tmp_path / "0.parquet"), "--workers", "0", "--json"]
    assert main([*command, "--write-clean", str(tmp_path / "c.txt")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["subsets"]["docvqa"]["faults"] == {"corrupt image": 1}
    assert (tmp_path / "c.txt").read_text() == "0\n2\n"
    with pytest.raises(ValueError, match=r"write a \.txt of row numbers"):
        main([*command, "--write-clean", str(tmp_path / "c.jsonl")])


def test_inspect_shows_what_training_sees(broken, tmp_path, capsys):
    crops = tmp_path / "crops"
    assert main(["inspect", *broken, "--id", "good", "--json", "--save-crops", str(crops)]) == 0
    seen = json.loads(capsys.readouterr().out)
    kinds = [run["kind"] for run in seen["runs"]]
    assert kinds == ["prompt", "image", "prompt", "supervised"]
    assert seen["runs"][3]["text"] == "red</s>"
    assert seen["runs"][1]["tokens"] == 17 and seen["crops"] == [1]
    assert seen["image_sizes_hw"] == [[30, 40]]
    assert sum(run["tokens"] for run in seen["runs"]) == seen["tokens"] == len(seen["input_ids"])
    assert seen["supervised"] == sum(label != -100 for label in seen["labels"])
    assert seen["supervised"] == seen["runs"][3]["tokens"]
    with Image.open(seen["crop_files"][0]) as crop:
        assert crop.size == (56, 56)
        red, green, blue = crop.getpixel((28, 28))
        assert red > 250 and green < 5 and blue < 5
    assert main(["inspect", *broken, "--row", "8"]) == 0
    out = capsys.readouterr().out
    assert "CUT at the length limit" in out and "⟦yyy" in out
    with pytest.raises(ValueError, match="--row 99: there are 13 rows"):
        main(["inspect", *broken, "--row", "99"])
    with pytest.raises(ValueError, match="inspect needs a tokenizer"):
        main(["inspect", *broken[:4]])
    with pytest.raises(ValueError, match="--id nobody: no row has that id"):
        main(["inspect", *broken, "--id", "nobody"])


def test_inspect_of_anyres_counts_every_crop(broken, tmp_path, capsys):
    main(["inspect", *broken, "--json", "--image-aspect-ratio", "anyres"])
    seen = json.loads(capsys.readouterr().out)
    assert seen["crops"][0] > 1
    assert seen["runs"][1]["tokens"] == seen["crops"][0] * 17


def test_bench_measures_each_number_of_processes(broken, capsys):
    arguments = ["--batch-size", "2", "--batches", "3", "--workers", "0", "2", "--prefetch", "2"]
    assert main(["bench", *broken, *arguments, "--json"]) == 0
    none, two = json.loads(capsys.readouterr().out)
    assert (none["workers"], two["workers"]) == (0, 2)
    assert none["rows_per_second"] > 0 and none["prefetch_bytes"] == 0
    assert two["rows_per_second_per_worker"] == pytest.approx(two["rows_per_second"] / 2, abs=0.01)
    assert two["prefetch_bytes"] == 4 * two["batch_bytes"] >= 4 * 3 * 56 * 56 * 4
    with pytest.raises(ValueError, match="need more than the 13 rows there are"):
        main(["bench", *broken, "--batch-size", "8"])


@pytest.mark.parametrize("command", ["check", "inspect", "bench"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example:\n    python -m proxyv.data {command}" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line_without_a_number(tmp_path, capsys):
    path = tmp_path / "none" / "a.txt"
    assert run_command(lambda _: path.write_text("")) == 2
    assert capsys.readouterr().err == f"error: {path}: no such file or directory\n"


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert run_command(main, ["check", "--annotations", str(tmp_path / "gone.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.annotations: no file") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "runs/none"], "--model runs/none: no finished run"),
        (["--tokenizer", "data/none", "--template", "v1"], "--tokenizer data/none: no such folder"),
    ],
)
def test_folders_that_are_not_there_are_not_looked_for_on_the_hub(broken, capsys, given, message):
    rows = broken[: broken.index("--tokenizer")] if "--tokenizer" in broken else broken
    assert run_command(main, ["inspect", *rows, *given]) == 2
    assert message in capsys.readouterr().err


def test_a_streamed_set_is_shown_as_any_other(tmp_path, capsys):
    import datasets

    said = row("one", None, mark="")["conversations"]
    image = {"bytes": picture("red"), "path": None}
    said[0]["value"] = "<image>\n" + said[0]["value"]
    table = datasets.Dataset.from_list([{"id": "one", "image": image, "conversations": said}])
    table.to_parquet(tmp_path / "rows.parquet")
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shown = []
    for streaming in ([], ["--streaming"]):
        words = ["--annotations", str(tmp_path / "rows.parquet"), *streaming, "--json"]
        words += ["--tokenizer", str(tmp_path / "tokenizer"), "--template", "tiny"]
        assert main(["inspect", *words, "--row", "0"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert " (streamed): row 0" in shown[1]["where"]
    assert {**shown[0], "where": ""} == {**shown[1], "where": ""}
