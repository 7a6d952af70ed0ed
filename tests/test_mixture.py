"""Mixtures, DocStruct4M's rows, and the table of row lengths."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proxyv.data import scan
from proxyv.data.dataset import FACTS, ConversationDataset, check_rows, report_rows
from proxyv.data.images import DataError, ImageFolder
from proxyv.data.mixture import MixtureSource, read_rows
from proxyv.data.pipeline import ImagePipeline
from proxyv.data.readers import JsonSource
from proxyv.data.scan import ScanStopped, scan_rows
from proxyv.data.sources import open_source
from proxyv.data.templates import Renderer
from proxyv.train.stage0.tokenizer import build_tokenizer

PIPELINE = ImagePipeline(
    inputs=lambda images: {
        "pixel_values": torch.zeros(len(images), 1, 3, 2, 2),
        "num_crops": torch.ones(len(images), dtype=torch.long),
        "image_sizes": torch.tensor([(image.height, image.width) for image in images]),
    },
    count_crops=lambda size_hw: 1,
    rows_per_crop=10,
)


def png(colour: str = "white") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def record(name: str, answer: str = "yes", image: object = None) -> dict:
    question = "<image>\nQ?" if image is not None else "Q?"
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": said}


def write_json(path: Path, records: list) -> str:
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


def names(source) -> list[str]:
    return [source.record(i)["id"] for i in range(len(source))]


def test_mixture_weights_lists_and_folders(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    big = write_json(tmp_path / "big.jsonl", [record(f"b{i}") for i in range(40)])
    small = write_json(tmp_path / "small.jsonl", [record("s0", image="a.png"), record("s1")])
    (tmp_path / "clean.txt").write_text("1\n3\n5\n7\n")
    (tmp_path / "mix.yaml").write_text(
        f"- {{annotations: {big}, weight: 0.25}}\n"
        f"- {{annotations: {small}, images: {tmp_path}/pictures, weight: 2.5}}\n"
        f"- {{annotations: {big}, rows: {tmp_path}/clean.txt}}\n"
    )
    source = open_source(str(tmp_path / "mix.yaml"), None)
    assert isinstance(source, MixtureSource)
    found = names(source)
    assert len(found) == 10 + 5 + 4
    assert len(set(found[:10])) == 10 and found[:10] == sorted(found[:10], key=lambda n: int(n[1:]))
    assert sorted(found[10:15]) in (["s0", "s0", "s0", "s1", "s1"], ["s0", "s0", "s1", "s1", "s1"])
    assert found[15:] == ["b1", "b3", "b5", "b7"]
    assert source[10].images[0].load().size == (8, 6)
    again = open_source(str(tmp_path / "mix.yaml"), None)
    assert names(again) == found and again.fingerprint == source.fingerprint
    (tmp_path / "clean.txt").write_text("1\n3\n5\n8\n")
    assert open_source(str(tmp_path / "mix.yaml"), None).fingerprint != source.fingerprint


def test_a_share_is_rounded_and_every_entry_draws_its_own(tmp_path):
    """0.29 * 100 is a little less than 29 in floating point."""
    rows = write_json(tmp_path / "rows.jsonl", [record(str(i)) for i in range(100)])
    (tmp_path / "mix.yaml").write_text(2 * f"- {{annotations: {rows}, weight: 0.29}}\n")
    found = names(open_source(str(tmp_path / "mix.yaml"), None))
    assert len(found) == 2 * 29 and len(set(found)) > 29


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("annotations: a.json", "expected a list of data sets"),
        ("- weight: 1", "entry 0: expected a mapping with 'annotations'"),
        ("- {annotations: X, wieght: 1}", "unknown key 'wieght': did you mean 'weight'"),
        ("- {annotations: X, weight: 0}", "weight=0.0 must be above 0"),
        ("- {annotations: X, weight: lots}", "weight='lots' must be a number"),
        ("- {annotations: other.yaml}", "cannot hold another mixture"),
        ("- {annotations: X, rows: R}", "row 2 is listed, but there are only 2 rows"),
        ("- {annotations: X, weight: 0.1}", "the mixture has no rows"),
    ],
)
def test_wrong_mixtures_are_named(tmp_path, text, message):
    data = write_json(tmp_path / "x.jsonl", [record("0"), record("1")])
    (tmp_path / "rows.txt").write_text("2")
    text = text.replace("X", data).replace("R}", f"{tmp_path}/rows.txt}}")
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "mix.yaml"), None)


def test_row_lists_hold_numbers(tmp_path):
    (tmp_path / "rows.txt").write_text("1\ntwo\n")
    with pytest.raises(ValueError, match=r"rows\.txt, line 2: expected a row number, got 'two'"):
        read_rows(tmp_path / "rows.txt")


def test_rows_of_docstruct4m(tmp_path):
    """Its own fields: a list of images under ./imgs, messages with roles, <|image|> marks."""
    (tmp_path / "imgs" / "CCpdf").mkdir(parents=True)
    (tmp_path / "imgs" / "CCpdf" / "p.png").write_bytes(png())
    line = {
        "image": ["./imgs/CCpdf/p.png"],
        "messages": [
            {"role": "user", "content": "<|image|>Recognize text in the image."},
            {"role": "assistant", "content": "<doc> Total <|image|> 3 </doc>"},
        ],
        "task_name": "doc_parse",
        "dataset_name": "CCpdf",
    }
    row = open_source(write_json(tmp_path / "parse.jsonl", [line]), str(tmp_path))[0]
    assert row.turns[0].text == "<image>Recognize text in the image."
    assert row.turns[1].text == "<doc> Total <|image|> 3 </doc>"
    assert row.images[0].load().size == (8, 6)
    assert row.subset == "CCpdf"


def test_subsets(tmp_path):
    records = [
        record("a", image="coco/train2017/1.jpg"),
        record("b") | {"data_source": "sharegpt"},
        record("c"),
        record("d", image={"bytes": png(), "path": "x.png"}),
    ]
    source = JsonSource(
        Path(write_json(tmp_path / "r.jsonl", [r for r in records if r["id"] != "d"])),
        ImageFolder(tmp_path),
    )
    assert [row.subset for row in source] == ["coco/train2017", "sharegpt", "text only"]


def dataset(source, **how) -> ConversationDataset:
    return ConversationDataset(source, Renderer(build_tokenizer(), "tiny"), PIPELINE, 64, **how)


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_of_every_row_are_what_training_sees(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(scan, "_BATCH", 2)
    (tmp_path / "a.png").write_bytes(png())
    records = [
        record("short"),
        record("picture", image="a.png"),
        record("long", "y" * 200),
        record("gone", image="b.png"),
    ]
    source = JsonSource(Path(write_json(tmp_path / "r.jsonl", records)), ImageFolder(tmp_path))
    data = dataset(source, on_failure="skip")
    drawn = torch.random.get_rng_state()
    table = scan_rows(data, workers, cache=tmp_path / "cache")
    assert (torch.random.get_rng_state() == drawn).all()
    assert table.dtype == FACTS
    assert table["failed"].tolist() == [False, False, False, True]
    assert table["images"].tolist() == [0, 1, 0, 0]
    for index in range(3):
        assert table["tokens"][index] == len(data[index]["input_ids"])
        assert table["supervised"][index] == (data[index]["labels"] != -100).sum()
    assert table["hidden"].tolist() == [0, 0, 201 - table["supervised"][2], 0]
    report = report_rows(data, table, 0.0)
    assert (report.checked, report.failed, report.cut) == (4, 1, 1)
    assert "1 (" in report.lines()[1] and "cannot be used: 1" in report.lines()[1]
    with pytest.raises(DataError, match=r"\(id 'gone'\)"):
        report_rows(dataset(source), table, 0.0)
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    np.save(kept[0], table[:2])  # a table that is there is read, not made
    assert len(scan_rows(data, 0, cache=tmp_path / "cache")) == 2
    other = ConversationDataset(source, data.renderer, PIPELINE, 60, on_failure="skip")
    assert len(scan_rows(other, 0, cache=tmp_path / "cache")) == 4


def rows_with_images(folder: Path, there: str) -> ConversationDataset:
    """Rows a to d with an image each, of which some are there; a pipeline that refuses the rest."""
    (folder / "set").mkdir(exist_ok=True)
    for name in there:
        (folder / "set" / f"{name}.png").write_bytes(png())
    records = [record(name, image=f"{name}.png") for name in "abcd"]
    path = write_json(folder / "rows.jsonl", records)
    return dataset(open_source(path, str(folder / "set")))


def test_rows_that_failed_are_looked_at_again(tmp_path):
    """Images are put back one after the other, as by a user who reads the messages."""
    cache = tmp_path / "cache"
    for there, failed in (("cd", 2), ("ac", 1), ("b", 0)):
        data = rows_with_images(tmp_path, there)
        table = scan_rows(data, 0, cache)
        assert table["failed"].sum() == failed
        if failed:
            gone = "a" if failed == 2 else "b"
            with pytest.raises(DataError, match=rf"\(id '{gone}'\).* no image file"):
                report_rows(data, table, 0.0)
    assert report_rows(data, table, 0.0).failed == 0
    assert (table == scan_rows(data, 0, None)).all()


def test_a_row_mended_since_the_look_at_it_is_not_taken_as_empty(tmp_path):
    table = scan_rows(rows_with_images(tmp_path, "bcd"), 0)
    with pytest.raises(DataError, match=r"row 0 could not be used .* and can be now: start again"):
        report_rows(rows_with_images(tmp_path, "a"), table, 0.0)


def test_another_image_folder_or_limit_makes_another_table(tmp_path):
    data = rows_with_images(tmp_path, "abcd")
    path = str(tmp_path / "rows.jsonl")
    scan_rows(data, 0, tmp_path / "cache")
    (tmp_path / "other").mkdir()
    elsewhere = dataset(open_source(path, str(tmp_path / "other")))
    small = dataset(open_source(path, str(tmp_path / "set"), max_megapixels=1e-5))
    for other in (elsewhere, small):
        assert scan_rows(other, 0, tmp_path / "cache")["failed"].all()


def test_a_set_of_which_nothing_can_be_used_is_refused(tmp_path):
    data = rows_with_images(tmp_path, "")
    data.on_failure = "skip"
    with pytest.raises(DataError, match=r"none of the 4 rows .* the first: .*\(id 'a'\)") as caught:
        report_rows(data, scan_rows(data, 0), 1.0)
    assert caught.value.kind == "missing image"
    with pytest.raises(DataError, match="none of the 2 rows looked at can be used"):
        check_rows(data, 2, 1.0)
    rows_with_images(tmp_path, "d")
    assert check_rows(data, 4, 0.0).failed == 3


def test_a_look_that_is_broken_off_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_BATCH", 2)
    looked_at: list[int] = []
    data, cache = rows_with_images(tmp_path, "abcd"), tmp_path / "cache"
    whole = scan_rows(data, 0)
    measure = data.measure
    monkeypatch.setattr(data, "measure", lambda row: [looked_at.append(row), measure(row)][1])
    with pytest.raises(ScanStopped, match="broken off after 2 of 4 rows"):
        scan_rows(data, 0, cache, stopped=lambda: len(looked_at) == 2)
    assert (scan_rows(data, 0, cache, stopped=lambda: len(looked_at) == 4) == whole).all()
    assert looked_at == [0, 1, 2, 3]


def test_a_copy_of_a_set_is_known_by_its_content(tmp_path):
    path = Path(write_json(tmp_path / "rows.jsonl", [record("a"), record("b")]))
    before = open_source(str(path), None).fingerprint
    os.utime(path, (1, 1))
    assert open_source(str(path), None).fingerprint == before
    write_json(path, [record("b"), record("a")])
    os.utime(path, (1, 1))
    assert open_source(str(path), None).fingerprint != before
