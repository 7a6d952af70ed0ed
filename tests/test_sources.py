"""Readers of JSON and parquet: rows, images, and errors that name the offender."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxyv.data import readers
from proxyv.data.images import DataError, ImageFolder, ImageRef, image_of_bytes
from proxyv.data.readers import JsonSource
from proxyv.data.rows import parse_row
from proxyv.data.sources import open_source

SAID = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That"}]


def write_image(path: Path, size=(20, 10)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path)
    return path.read_bytes()


def write_json(folder: Path, rows, name="rows.json", **how) -> str:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, **how), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("block", [1 << 22, 7])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("rows.json", {}),
        ("rows.json", {"indent": 1, "ensure_ascii": False}),
        ("rows.jsonl", {}),
    ],
)
def test_rows_of_any_json_form_and_block_size(tmp_path, monkeypatch, name, how, block):
    monkeypatch.setattr(readers, "_BLOCK_BYTES", block)
    write_image(tmp_path / "a.png")
    rows = [
        {
            "id": str(i),
            "image": "a.png",
            "conversations": [SAID[0], {"from": "gpt", "value": f"é 图 {i} ] }}, [" + "\\"}],
        }
        for i in range(5)
    ]
    source = open_source(write_json(tmp_path, rows, name, **how), str(tmp_path))
    assert len(source) == 5
    assert [source[i].turns[1].text for i in (4, 0, 2)] == [
        rows[i]["conversations"][1]["value"] for i in (4, 0, 2)
    ]
    assert source[3].images[0].load().size == (20, 10)
    assert source[3].images[0].size_hw() == (10, 20)


def test_a_source_travels_to_worker_processes(tmp_path):
    rows = [{"id": "1", "conversations": [{"from": "human", "value": "Q"}, SAID[1]]}]
    source = open_source(write_json(tmp_path, rows), None)
    assert source[0].turns[0].text == "Q"
    assert pickle.loads(pickle.dumps(source))[0].turns[0].text == "Q"


def test_broken_json_names_file_and_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"id": 1}, {"id": ')
    with pytest.raises(DataError, match=r"rows\.json: row 1 is not valid JSON"):
        JsonSource(path, ImageFolder(None))
    path.write_text("[]")
    with pytest.raises(DataError, match="no rows"):
        JsonSource(path, ImageFolder(None))


@pytest.mark.parametrize("block", [1 << 22, 7])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{}, {}", "no ']' after 2 rows; is the file complete"),
        ("[{}, {},\n", "no ']' after 2 rows"),
        ("[", "no ']' after 0 rows"),
        ("[{}]\n[{}, {}]", "something follows the last of 1 rows, at byte 5"),
        ("[{}] x", "something follows the last of 1 rows, at byte 5"),
        ("{}\n{}]", "something follows the last of 2 rows, at byte 5"),
    ],
)
def test_a_cut_list_and_a_second_one_are_refused(tmp_path, monkeypatch, text, message, block):
    monkeypatch.setattr(readers, "_BLOCK_BYTES", block)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        JsonSource(tmp_path / "rows.json", ImageFolder(None))
    (tmp_path / "rows.json").write_text(" [{}, {}] \n\n")
    assert len(JsonSource(tmp_path / "rows.json", ImageFolder(None))) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "x7"}, r"row 4 \(id 'x7'\), field 'conversations': expected a list"),
        ({"conversations": SAID[:1], "image": "a.png"}, "no answer"),
        ({"conversations": SAID}, "1 <image> in the text, but 0 images"),
        ({"conversations": SAID, "image": ["a.png", "b.png"]}, "but 2 images"),
        ({"conversations": SAID, "image": 5}, "field 'image': expected a path or bytes, got int"),
        (
            {"conversations": [{"from": "gp", "value": "a"}]},
            "unknown role 'gp': did you mean 'gpt'",
        ),
        ({"conversations": ["hello"]}, "field 'conversations'"),
        ({"conversations": [*SAID, SAID[1]], "image": "a"}, "two messages in a row from 'assist"),
        ([1], "expected an object, got list"),
        (
            {"conversations": [SAID[0], SAID[1] | {"value": "ab \ud83d"}], "image": "a"},
            r"'conversations': message 1 \(from 'gpt'\): character 3 .* is '\\ud83d', half of a",
        ),
        ({"conversations": SAID, "image": "\udc00.png"}, r"field 'image': '\\udc00\.png' is no"),
    ],
)
def test_bad_rows_name_the_offender(record, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_row(record, "some.json", 4, ImageFolder(None))
    assert str(caught.value).startswith("some.json: row 4")
    assert "\n" not in str(caught.value)


def test_leading_answer_and_trailing_question_are_left_out():
    said = [SAID[1], *SAID, SAID[0] | {"value": "And?"}]
    row = parse_row({"conversations": said, "image": "a.png"}, "f", 0, ImageFolder(None))
    assert [turn.text for turn in row.turns] == ["<image>\nWhat?", "That"]


def load(tmp_path: Path, image: str, **limits):
    path = write_json(tmp_path, [{"id": "r", "image": image, "conversations": SAID}])
    return open_source(path, str(tmp_path / "root"), **limits)[0].images[0].load()


def test_images_stay_in_their_folder(tmp_path):
    write_image(tmp_path / "root" / "in.png")
    write_image(tmp_path / "out.png")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "root" / "inner.png").symlink_to(tmp_path / "root" / "in.png")
    assert load(tmp_path, "in.png").size == load(tmp_path, "inner.png").size == (20, 10)
    for escape in ("../out.png", str(tmp_path / "out.png"), "a/../../out.png"):
        with pytest.raises(DataError, match="must be relative and stay inside"):
            load(tmp_path, escape)
    with pytest.raises(DataError, match=r"through a symbolic link; set data\.follow_links"):
        load(tmp_path, "link.png")
    assert load(tmp_path, "link.png", follow_links=True).size == (20, 10)


def test_missing_corrupt_and_huge_images_are_named(tmp_path):
    whole = write_image(tmp_path / "root" / "big.png", size=(300, 200))
    (tmp_path / "root" / "not.png").write_bytes(b"no picture")
    (tmp_path / "root" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"row 0 \(id 'r'\), field 'image': no image file .*gone"):
        load(tmp_path, "gone.png")
    with pytest.raises(DataError, match=r"field 'image': not\.png is not an image"):
        load(tmp_path, "not.png")
    with pytest.raises(DataError, match=r"field 'image': cut\.png cannot be decoded"):
        load(tmp_path, "cut.png")
    with pytest.raises(DataError, match=r"200 x 300 pixels .* more than data.max_megapixels=0.05"):
        load(tmp_path, "big.png", max_megapixels=0.05)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("megapixels", "width", "height", "squared", "message"),
    [
        (100, 12_000, 1, False, None),
        (100, 12_000, 1, True, "1 x 12000 pixels .* square of 12000 x 12000 .* 144.0 megapixels"),
        (100, 1, 10_001, True, "10001 x 1 pixels .* square of 10001 x 10001"),
        (100, 10_000, 300, True, None),
        (100, 10_001, 10_000, False, "10000 x 10001 pixels .* 100.0 megapixels, more than"),
        (100, 20_000, 20_000, False, r"400000000 pixels.*\(data\.max_megapixels=100\)"),
        (500, 20_000, 20_000, False, None),  # beyond PIL's own limit
        (500, 25_000, 25_000, False, "625.0 megapixels, more than data.max_megapixels=500"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_is_the_settings(megapixels, width, height, squared, message):
    pils = Image.MAX_IMAGE_PIXELS
    folder = ImageFolder(None, megapixels, squared=squared)
    reference = ImageRef(folder, png_header(width, height), "row 3")
    if message is None:
        assert reference.size_hw() == (height, width)
    else:
        for read in (reference.size_hw, reference.load):
            with pytest.raises(DataError, match=message) as caught:
                read()
            assert caught.value.kind == "image too large"
    assert Image.MAX_IMAGE_PIXELS == pils


def test_beyond_pils_own_limit_no_setting_is_named():
    """An evaluation has none."""
    reference = image_of_bytes(png_header(20_000, 9_500), "row 3")
    with pytest.raises(DataError, match=r"row 3: .*190000000 pixels.*limit of 178956970") as caught:
        reference.size_hw()
    assert "(PIL's own limit)" in str(caught.value) and "data." not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "turned"),
    [
        (struct.pack("<HIHH", 3, 1, 6, 0), True),
        (struct.pack("<HIHH", 3, 2, 6, 1), True),  # two numbers: PIL takes the first
        (struct.pack("<HI4s", 2, 2, b"6\0\0\0"), False),  # a letter
        (struct.pack("<HI4s", 7, 1, b"\6\0\0\0"), False),  # a byte of no type
        (struct.pack("<HIHH", 3, 1, 9, 0), False),  # no such orientation
    ],
)
def test_an_odd_orientation_is_none(entry, turned):
    head = b"Exif\0\0II*\0" + struct.pack("<IHH", 8, 1, 0x0112)
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=head + entry + struct.pack("<I", 0))
    reference = ImageRef(ImageFolder(None), file.getvalue(), "row 1")
    assert reference.size_hw() == ((20, 10) if turned else (10, 20))
    assert reference.load().size == reference.size_hw()[::-1]


@pytest.mark.parametrize("exif", [True, False])
def test_the_size_of_a_png_is_read_without_its_pixels(exif):
    rotation = Image.Exif()
    rotation[0x0112] = 8
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "PNG", **({"exif": rotation} if exif else {}))
    whole = file.getvalue()
    without = whole[: whole.index(b"IDAT") + 4]  # cut within the first bytes of pixels
    size = ImageRef(ImageFolder(None), without, "row 1").size_hw()
    assert size == ((20, 10) if exif else (10, 20))


def test_rotated_photographs_come_upright(tmp_path):
    (tmp_path / "root").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (20, 10)).save(tmp_path / "root" / "turned.jpg", exif=exif)
    path = write_json(tmp_path, [{"image": "turned.jpg", "conversations": SAID}])
    reference = open_source(path, str(tmp_path / "root"))[0].images[0]
    assert reference.load().size == (10, 20)
    assert reference.size_hw() == (20, 10)


def test_transparent_deep_and_plain_images_come_as_the_processor_has_them():
    def decoded(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return ImageFolder(None).decode(file.getvalue())

    clear = decoded(Image.new("RGBA", (3, 2), (200, 0, 0, 0)))
    assert (clear.mode, clear.getpixel((1, 1))) == ("RGB", (255, 255, 255))
    deep = decoded(Image.fromarray(np.full((2, 3), 200 * 257, dtype=np.uint16)))
    assert deep.getpixel((1, 1)) == (200, 200, 200)
    assert decoded(Image.new("RGB", (3, 2), (1, 2, 3))).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "AVIF", "DDS"])
def test_damaged_files_of_every_form_raise_nothing_else(form):
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(file, form)
    whole, failed = np.frombuffer(file.getvalue(), np.uint8), 0
    for number in range(100):
        damaged = whole.copy()
        reach = len(whole) if number % 2 else min(len(whole), 100)
        damaged[random.integers(0, reach, 4)] = random.integers(0, 256, 4)
        cut = damaged[: random.integers(1, len(whole))] if number % 4 == 0 else damaged
        reference = ImageRef(ImageFolder(None, 4.0), cut.tobytes(), "row 1")
        try:
            reference.load()
        except DataError as error:
            failed += 1
            assert error.kind in ("corrupt image", "image too large")
            assert str(error).startswith("row 1: ")
    assert failed > 10 or form == "DDS"  # of which hardly a byte decides


@pytest.mark.parametrize("feature", [True, False])
def test_parquet_with_bytes(tmp_path, monkeypatch, feature):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    raw = write_image(tmp_path / "a.png")
    rows = {
        "id": ["p", "t"],
        "conversations": [SAID, [{"from": "human", "value": "Q"}, SAID[1]]],
        "image": [{"bytes": raw, "path": None}, None],
    }
    table = datasets.Dataset.from_dict(rows)
    if feature:
        table = table.cast_column("image", datasets.Image())
    (tmp_path / "shards").mkdir()
    table.to_parquet(tmp_path / "shards" / "0.parquet")
    source = open_source(str(tmp_path / "shards"), None)
    assert len(source) == 2
    assert source[0].images[0].load().size == Image.open(io.BytesIO(raw)).size
    assert source[1].images == ()


def test_parquet_with_several_images_a_row(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sizes = [(20, 10), (8, 30)]
    pictures = [
        {"bytes": write_image(tmp_path / f"{size}.png", size), "path": None} for size in sizes
    ]
    said = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, SAID[1]]
    table = datasets.Dataset.from_dict({"conversations": [said], "image": [pictures]})
    table = table.cast_column("image", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "several.parquet")
    for streaming in (False, True):
        [row] = open_source(str(tmp_path / "several.parquet"), None, streaming=streaming)
        assert [image.load().size for image in row.images] == sizes


def test_places_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.annotations: no file .*gone\.json"):
        open_source(str(tmp_path / "gone.json"), None)
    with pytest.raises(FileNotFoundError, match=r"data\.images: no folder 'nowhere'"):
        open_source(str(tmp_path / "gone.json"), "nowhere")
    (tmp_path / "rows.csv").write_text("a")
    with pytest.raises(ValueError, match=r"expected \.json, \.jsonl, \.parquet"):
        open_source(str(tmp_path / "rows.csv"), None)
