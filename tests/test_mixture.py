"""Mixtures, DocStruct4M's rows, streams, and the table of row lengths."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from proxyv.data.collator import Collator
from proxyv.data.dataset import FACTS, ConversationDataset, report_rows
from proxyv.data.images import DataError, ImageFolder
from proxyv.data.mixture import MixtureSource, read_rows
from proxyv.data.pipeline import ImagePipeline
from proxyv.data.scan import scan_rows
from proxyv.data.sources import JsonSource, open_source
from proxyv.data.stream import ConversationStream
from proxyv.data.templates import Renderer
from proxyv.train.stage0.tokenizer import build_tokenizer

PIPELINE = ImagePipeline(
    inputs=lambda images: {
        "pixel_values": torch.zeros(len(images), 1, 3, 2, 2),
        "num_crops": torch.ones(len(images), dtype=torch.long),
        "image_sizes": torch.tensor([(image.height, image.width) for image in images]),
    },
    count_crops=lambda size_hw: 1,
    tokens_per_crop=10,
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


def write_parquet(folder: Path, shards: int, rows: int) -> str:
    import datasets

    folder.mkdir()
    for shard in range(shards):
        records = [
            record(f"{shard}-{row}", image={"bytes": png(), "path": None} if row % 2 else None)
            for row in range(rows)
        ]
        table = datasets.Dataset.from_list(records)
        table.cast_column("image", datasets.Image()).to_parquet(folder / f"{shard}.parquet")
    return str(folder)


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
def test_lengths_of_every_row_are_what_training_sees(tmp_path, workers):
    (tmp_path / "a.png").write_bytes(png())
    records = [
        record("short"),
        record("picture", image="a.png"),
        record("long", "y" * 200),
        record("gone", image="b.png"),
    ]
    source = JsonSource(Path(write_json(tmp_path / "r.jsonl", records)), ImageFolder(tmp_path))
    data = dataset(source, on_failure="skip")
    table = scan_rows(data, workers, cache=tmp_path / "cache")
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


@pytest.fixture
def no_rest(monkeypatch):
    """``datasets`` waits for seconds at the end of a shuffled stream."""
    import datasets

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def stream(path: str, **how) -> ConversationStream:
    renderer = Renderer(build_tokenizer(), "tiny")
    return ConversationStream(path, ImageFolder(None), renderer, PIPELINE, 64, **how)


def seen(samples) -> list[str]:
    return [sample["where"].split("id ")[1] for sample in samples]


def test_a_stream_gives_every_row_once_to_one_rank_and_worker(tmp_path, no_rest):
    path = write_parquet(tmp_path / "shards", shards=4, rows=5)
    everything = sorted(f"'{shard}-{row}')" for shard in range(4) for row in range(5))
    one = seen(stream(path, buffer=4))
    assert sorted(one) == everything
    assert one == seen(stream(path, buffer=4))
    ranks = [seen(stream(path, buffer=4, rank=rank, ranks=2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == everything
    later = stream(path, buffer=4)
    later.set_epoch(1)
    assert sorted(seen(later)) == everything and seen(later) != one
    loader = DataLoader(
        stream(path), batch_size=3, num_workers=2, collate_fn=Collator(0, describe=True)
    )
    batches = list(loader)
    rows = [row for batch in batches for row in batch["rows"]]
    assert sorted(row.split("id ")[1] for row in rows) == everything
    assert sum(len(batch.get("num_crops", [])) for batch in batches) == 8


def test_a_stream_goes_on_from_its_state(tmp_path, no_rest):
    path = write_parquet(tmp_path / "shards", shards=2, rows=6)
    first = stream(path, buffer=1)
    rows = iter(first)
    begun = [next(rows) for _ in range(5)]
    state = first.state_dict()
    rest = seen(rows)
    second = stream(path, buffer=1)
    second.load_state_dict(state)
    resumed = seen(second)
    assert not set(resumed) & set(seen(begun))
    assert len(rest) - len(resumed) <= 1  # what lay in the buffer


def test_a_stream_skips_or_raises(tmp_path, no_rest):
    import datasets

    bad = record("bad", image={"bytes": b"no picture", "path": None})
    good = record("good", image={"bytes": png(), "path": None})
    (tmp_path / "s").mkdir()
    datasets.Dataset.from_list([bad, good]).to_parquet(tmp_path / "s" / "0.parquet")
    samples = list(stream(str(tmp_path / "s"), on_failure="skip"))
    assert [("failure" in sample) for sample in samples].count(True) == 1
    with pytest.raises(DataError, match=r"\(id 'bad'\).* is not an image"):
        list(stream(str(tmp_path / "s")))
