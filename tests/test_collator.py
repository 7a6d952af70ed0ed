"""Padding, stacking of crops, the dummy image, and the dataset in front of them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from proxyv.data.collator import Collator, DummyImage
from proxyv.data.dataset import ConversationDataset, ImagePipeline, check_rows
from proxyv.data.failures import FailureLog
from proxyv.data.images import DataError, ImageFolder
from proxyv.data.rows import parse_row
from proxyv.data.templates import IGNORE_INDEX, Renderer
from proxyv.train.stage0.tokenizer import build_tokenizer


def text(*ids, labels=None):
    labels = ids if labels is None else labels
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def with_images(sample, crops):
    """Images of the given numbers of crops, crop values 1, 2, ..."""
    most = max(crops)
    pixels = torch.zeros(len(crops), most, 3, 2, 2)
    for number, count in enumerate(crops):
        pixels[number, :count] = number + 1.0
    sizes = torch.full((len(crops), 2), 9)
    return sample | {
        "pixel_values": pixels,
        "num_crops": torch.tensor(crops),
        "image_sizes": sizes,
    }


def test_tokens_that_equal_the_padding_stay():
    batch = Collator(0)([text(5, 6, 0), text(7, labels=[IGNORE_INDEX])])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 0], [IGNORE_INDEX] * 3]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_images_of_different_crops_are_stacked_in_row_order():
    samples = [with_images(text(1), [1]), text(2), with_images(text(3), [3, 2])]
    batch = Collator(0)(samples)
    assert batch["pixel_values"].shape == (3, 3, 3, 2, 2)
    assert batch["num_crops"].tolist() == [1, 3, 2]
    assert batch["image_sizes"].shape == (3, 2)
    sums = batch["pixel_values"].sum(dim=(2, 3, 4)) / 12
    assert sums.tolist() == [[1, 0, 0], [1, 1, 1], [2, 2, 0]]


def test_dummy_image_only_where_a_batch_has_none():
    collate = Collator(0, DummyImage(image_token_id=4, tokens=5, crop_px=2))
    batch = collate([text(1, 2, 3), text(1)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [1, 4, 4, 4, 4, 4]]
    assert batch["labels"][1].tolist() == [1] + [IGNORE_INDEX] * 5
    assert batch["attention_mask"].sum().item() == 9
    assert batch["pixel_values"].shape == (1, 1, 3, 2, 2)
    assert batch["num_crops"].tolist() == [1]
    usual = collate([text(1), with_images(text(2), [1])])
    assert usual["input_ids"].tolist() == [[1], [2]]


def test_failed_rows_are_left_out_and_named():
    collate = Collator(0, DummyImage(image_token_id=4, tokens=3, crop_px=2), describe=True)
    failed = {"failure": "f.json: row 3: no image"}
    batch = collate([text(5) | {"where": "f.json: row 2"}, failed])
    assert batch["rows"] == ["f.json: row 2"]
    assert batch["failures"] == ["f.json: row 3: no image"]
    assert batch["input_ids"].tolist() == [[5, 4, 4, 4]]
    batch = collate([failed, failed])
    assert batch["rows"] == [""]
    assert len(batch["failures"]) == 2
    assert batch["input_ids"].tolist() == [[0, 4, 4, 4]]
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert "failures" not in Collator(0)([text(5), failed])


@pytest.mark.parametrize("workers", [0, 2])
def test_failing_images_are_skipped_counted_and_listed(tmp_path, workers):
    Image.new("RGB", (6, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    said = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A"}]
    records = [
        {"id": name, "image": f"{name}.png", "conversations": said}
        for name in ("good", "bad", "gone", "good")
    ]
    source = [parse_row(r, "f.json", i, ImageFolder(tmp_path)) for i, r in enumerate(records)]
    with pytest.raises(DataError, match=r"row 1 \(id 'bad'\).* is not an image"):
        dataset(source)[1]
    loader = DataLoader(
        dataset(source, on_failure="skip"),
        batch_size=2,
        collate_fn=Collator(0, describe=True),
        num_workers=workers,
    )
    log = FailureLog(tmp_path / "run" / "failures.txt")
    for _ in range(2):  # two passes name a row once
        batches = list(loader)
        for batch in batches:
            log.add(batch["failures"])
    assert [len(batch["input_ids"]) for batch in batches] == [1, 1]
    assert [batch["rows"][0][:13] for batch in batches] == ["f.json: row 0", "f.json: row 3"]
    listed = log.path.read_text().splitlines()
    assert len(listed) == len(log) == 2
    assert "(id 'bad')" in listed[0] and "(id 'gone')" in listed[1]
    again = FailureLog(log.path)
    assert again.add([listed[0], "a new one\nin two lines"]) == ["a new one in two lines"]
    assert len(again) == 3


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="unknown value of on_failure 'skp': did you mean 'skip'"):
        dataset(rows(1), on_failure="skp")


def rows(number, answer="yes", image=True):
    said = [
        {"from": "human", "value": "<image>\nQ?" if image else "Q?"},
        {"from": "gpt", "value": answer},
    ]
    return [
        parse_row(
            {"id": i, "conversations": said, "image": "a.png" if image else None},
            "rows.json",
            i,
            ImageFolder(None),
        )
        for i in range(number)
    ]


PIPELINE = ImagePipeline(
    inputs=lambda images: {
        "pixel_values": torch.zeros(len(images), 1, 3, 2, 2),
        "num_crops": torch.ones(len(images), dtype=torch.long),
        "image_sizes": torch.tensor([(image.height, image.width) for image in images]),
    },
    count_crops=lambda size_hw: 1,
    rows_per_crop=10,
)


class Listed(list):
    """Rows in a list are a source without blocks."""

    blocks = None


def dataset(source, max_length=64, **how):
    return ConversationDataset(
        source, Renderer(build_tokenizer(), "tiny"), PIPELINE, max_length, **how
    )


def test_dataset_renders_image_and_text_rows(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path)
    said = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    record = {"conversations": said, "image": "a.png"}
    data = dataset([parse_row(record, "f", 0, folder), *rows(1, image=False)])
    sample = data[0]
    assert sample["image_sizes"].tolist() == [[4, 6]]
    assert (sample["input_ids"] == 4).sum() == 10
    assert data.rendered(0).input_ids == sample["input_ids"].tolist()
    assert "pixel_values" not in data[1]
    assert len(dataset(rows(5), limit=2)) == 2


def test_rows_are_cut_on_the_right_but_never_inside_an_image():
    long = dataset(rows(1, answer="y" * 100, image=False), max_length=20)
    assert len(long[0]["input_ids"]) == 20
    assert long.rendered(0).hidden == 101 - sum(long[0]["labels"] != IGNORE_INDEX)
    pipeline = ImagePipeline(PIPELINE.inputs, PIPELINE.count_crops, rows_per_crop=30)
    renderer = Renderer(build_tokenizer(), "tiny")
    row = rows(1)[0]
    crowded = ConversationDataset([row], renderer, pipeline, max_length=20)
    with pytest.raises(DataError, match=r"row 0 .*30 of them of images, do not fit .*=20"):
        crowded.render(row, [1])


def test_a_row_may_end_with_an_image_and_not_one_token_before():
    pipeline = ImagePipeline(PIPELINE.inputs, PIPELINE.count_crops, rows_per_crop=30)
    renderer, [row] = Renderer(build_tokenizer(), "tiny"), rows(1)
    whole = ConversationDataset([row], renderer, pipeline, max_length=99).render(row, [1])
    end = len(whole.input_ids) - whole.input_ids[::-1].index(renderer.image_token_id)
    cut = ConversationDataset([row], renderer, pipeline, max_length=end).render(row, [1])
    assert cut.input_ids == whole.input_ids[:end]
    shorter = ConversationDataset([row], renderer, pipeline, max_length=end - 1)
    with pytest.raises(DataError, match=f"max_length={end - 1} .*lose part of an image"):
        shorter.render(row, [1])


def test_rows_without_supervision_stop_the_run():
    kept = rows(99, image=False)
    lost = parse_row(
        {
            "id": "lost",
            "conversations": [
                {"from": "human", "value": "q" * 80},
                {"from": "gpt", "value": "a"},
            ],
        },
        "rows.json",
        99,
        ImageFolder(None),
    )
    report = check_rows(dataset(Listed([*kept, lost])), 100, 0.01)
    assert (report.unsupervised, report.cut, report.hidden, report.checked) == (1, 1, 2, 100)
    with pytest.raises(DataError, match=r"2 of 100 rows .*2\.0%.* the first is .*id 'lost'"):
        check_rows(dataset(Listed([lost, lost, *kept[:98]])), 100, 0.01)
    assert check_rows(dataset(Listed(kept)), 10, 0.0).checked == 10
