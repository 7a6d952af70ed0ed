"""Images and texts to inputs: pixels of the authors' recipe, counts that always agree."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv import ProxyVProcessor
from proxyv.model.crops import crop_layout, image_grids, num_image_tokens
from proxyv.model.images import to_rgb

PX, PATCH = 28, 7
SIDE = PX // PATCH
PINPOINTS = [[2 * PX, PX], [PX, 2 * PX], [2 * PX, 2 * PX], [PX, 3 * PX], [3 * PX, PX]]


def make_processor(px=PX, patch=PATCH, pinpoints=PINPOINTS, **options) -> ProxyVProcessor:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": px},
        crop_size={"height": px, "width": px},
        image_grid_pinpoints=pinpoints,
    )
    return ProxyVProcessor(image_processor=images, tokenizer=tokenizer, patch_size=patch, **options)


@pytest.fixture(scope="module")
def processor() -> ProxyVProcessor:
    return make_processor()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


AUTHORS_WH = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


def authors_crops(image: Image.Image, ratio: str) -> list[Image.Image]:
    """The authors' ``process_images`` up to CLIP's processor, said again: 336 x 336 pictures."""
    width, height = image.size
    if ratio == "pad":
        longest = max(width, height)
        square = Image.new("RGB", (longest, longest), (122, 116, 104))
        square.paste(image, ((longest - width) // 2, (longest - height) // 2))
        return [square]
    rated = []
    for order, (wide, high) in enumerate(AUTHORS_WH):
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        rated.append((-used, wide * high - used, order))
    wide, high = AUTHORS_WH[min(rated)[2]]
    across, down = wide / width, high / height
    if across < down:
        new = (wide, min(math.ceil(height * across), high))
    else:
        new = (min(math.ceil(width * down), wide), high)
    canvas = Image.new("RGB", (wide, high), (0, 0, 0))
    canvas.paste(image.resize(new), ((wide - new[0]) // 2, (high - new[1]) // 2))
    tiles = [
        canvas.crop((x, y, x + 336, y + 336))
        for y in range(0, high, 336)
        for x in range(0, wide, 336)
    ]
    return [image.resize((336, 336)), *tiles]


@pytest.mark.parametrize("ratio", ["pad", "anyres"])
@pytest.mark.parametrize(
    "size",
    [
        *((389, 517), (977, 233), (301, 1201), (131, 97), (1533, 2049), (336, 336), (101, 101)),
        *((333, 1000), (1, 1), (1, 700), (2900, 3), (336, 672), (672, 671)),
    ],
)
def test_pixels_are_the_authors_bit_for_bit(size, ratio) -> None:
    """With CLIP's own processor behind the authors' cutting, at the real size of crops."""
    pinpoints = [[high, wide] for wide, high in AUTHORS_WH]
    processor = make_processor(px=336, patch=14, pinpoints=pinpoints)
    image = picture(*size)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    expected = clip.preprocess(authors_crops(image, ratio), return_tensors="pt")["pixel_values"]
    inputs = processor.image_inputs(image, ratio)
    assert torch.equal(inputs["pixel_values"][0], expected)
    assert inputs["num_crops"].tolist() == [len(expected)]
    assert inputs["image_sizes"].tolist() == [list(size)]


def test_the_first_pinpoint_wins_a_tie() -> None:
    square = crop_layout((PX, PX), "anyres", PINPOINTS, PX)
    assert square.grid_hw == (2, 1) and square.num_crops == 3
    other = crop_layout((PX, PX), "anyres", PINPOINTS[1:], PX)
    assert other.grid_hw == (1, 2)


def test_a_single_tile_is_the_thumbnail_alone() -> None:
    """With a resolution of one crop, small pages are one crop and large ones several."""
    processor = make_processor(pinpoints=[[PX, PX], [2 * PX, 2 * PX]], image_aspect_ratio="anyres")
    small, large = picture(PX, PX), picture(2 * PX, 2 * PX)
    inputs = processor(images=[small, large], text="a<image>b<image>", return_tensors="pt")
    assert inputs["num_crops"].tolist() == [1, 5]
    assert [processor.crop_layout((side, side)).num_crops for side in (PX, 2 * PX)] == [1, 5]
    padded = processor.image_inputs(small, "pad")["pixel_values"][0]
    assert torch.equal(inputs["pixel_values"][0, :1], padded)
    assert not inputs["pixel_values"][0, 1:].any() and inputs["pixel_values"][1, 4].any()
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert tokens == 6 * (SIDE**2 + 1) == processor.token_counts(inputs)[0] * 6


sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes, st.sampled_from(["pad", "anyres"]))
def test_counts_agree_for_every_size(size, ratio) -> None:
    cut = crop_layout(size, ratio, PINPOINTS, PX)
    rows, columns = cut.grid_hw
    assert cut.num_crops == rows * columns + 1
    assert num_image_tokens(cut.num_crops, SIDE) == cut.num_crops * (SIDE**2 + 1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=3),
    st.sampled_from(["pad", "anyres"]),
)
def test_text_and_pixels_agree(images, ratio) -> None:
    processor = make_processor(image_aspect_ratio=ratio)
    inputs = processor(
        images=[picture(*size) for size in images],
        text="x" + "<image>" * len(images),
        return_tensors="pt",
    )
    crops = [processor.crop_layout(size).num_crops for size in images]
    assert inputs["num_crops"].tolist() == crops
    assert inputs["pixel_values"].shape[:2] == (len(images), max(crops))
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert tokens == sum(processor.num_image_tokens(size) for size in images)
    assert inputs["input_ids"].shape[1] == tokens + 1
    counted = processor._get_num_multimodal_tokens(image_sizes=images)
    assert sum(counted["num_image_tokens"]) == tokens


def test_a_batch_with_and_without_images(processor) -> None:
    inputs = processor(
        images=[[picture(30, 60)], [], [picture(60, 20), picture(28, 28)]],
        text=["a<image>b", "only text", "<image><image>"],
        padding=True,
        return_tensors="pt",
    )
    per_crop = SIDE**2 + 1
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    crops = inputs["num_crops"].tolist()
    assert counts == [crops[0] * per_crop, 0, (crops[1] + crops[2]) * per_crop]
    names = {"input_ids", "attention_mask", "pixel_values", "num_crops", "image_sizes"}
    assert names <= set(inputs) <= {*names, "token_type_ids"}
    padding = inputs["pixel_values"][0, crops[0] :]
    assert padding.numel() == 0 or float(padding.abs().max()) == 0


def test_text_alone_and_images_alone(processor) -> None:
    assert "pixel_values" not in processor(text="abc", return_tensors="pt")
    assert set(processor(images=picture(5, 5))) == {"pixel_values", "num_crops", "image_sizes"}
    lists = processor(text=["ab", "abc"], images=None)
    assert [len(ids) for ids in lists["input_ids"]] == [2, 3]


def test_saved_and_loaded_by_the_auto_class(tmp_path) -> None:
    first = make_processor(image_aspect_ratio="pad")
    first.save_pretrained(tmp_path)
    second = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(second, ProxyVProcessor)
    assert (second.image_aspect_ratio, second.patch_size, second.side) == ("pad", PATCH, SIDE)
    assert second.image_processor.image_grid_pinpoints == PINPOINTS
    call = {"images": picture(40, 70), "text": "q<image>", "return_tensors": "pt"}
    for ratio in (None, "anyres"):
        before, after = (p(**call, image_aspect_ratio=ratio) for p in (first, second))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"text": "<image>", "images": None}, ["1 <image>", "0 images"]),
        ({"text": ["a", "<image>"], "images": [picture(5, 5)] * 2}, ["1 <image>", "2 images"]),
        ({"text": "a", "images": []}, ["images is an empty list"]),
        ({}, ["give text, images or both"]),
        ({"images": picture(5, 5), "image_aspect_ratio": "crop"}, ["'crop'", "pad, anyres"]),
        ({"images": "<image>", "text": picture(5, 5)}, ["text is a Image", "images=..., text=..."]),
        ({"text": [["nested"]]}, ["text is a list", "list of strings"]),
        ({"text": "a", "videos": [[1]]}, ["0 <video>", "1 videos were given"]),
        ({"text": "<video>", "videos": 3}, ["a video is a int", "list of frames"]),
        ({"text": "<video>", "videos": np.zeros((0, 5, 5, 3))}, ["(0, 5, 5, 3)", "0 frames"]),
        ({"text": "a", "audio": [1]}, ["audio was given"]),
        (
            {"text": "<image>", "images": picture(5, 5), "truncation": True, "max_length": 9},
            ["text 0 has 9 image tokens", "raise max_length"],
        ),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_are_refused(processor, call, words) -> None:
    with pytest.raises(ValueError) as error:
        processor(**call)
    for word in words:
        assert word in str(error.value)


def test_processors_that_cannot_work_are_refused(processor) -> None:
    with pytest.raises(ValueError, match=r"image_aspect_ratio='square'"):
        make_processor(image_aspect_ratio="square")
    with pytest.raises(ValueError, match=r"patch_size=5 does not divide .* 28 pixels"):
        ProxyVProcessor(processor.image_processor, processor.tokenizer, patch_size=5)
    with pytest.raises(ValueError, match="image_processor is a NoneType"):
        ProxyVProcessor(None, processor.tokenizer, patch_size=PATCH)
    with pytest.raises(ValueError, match=r"image_token='<picture>'"):
        make_processor(image_token="<picture>")
    with pytest.raises(ValueError, match=r"\(30, 28\).* multiples of 28"):
        crop_layout((10, 10), "anyres", [[30, 28]], 28)
    with pytest.raises(ValueError, match="height 0"):
        crop_layout((0, 10), "pad", PINPOINTS, 28)
    with pytest.raises(ValueError, match="image_grid_pinpoints is empty"):
        crop_layout((10, 10), "anyres", [], 28)


def test_images_of_every_kind_become_upright_rgb(tmp_path) -> None:
    image = picture(4, 6)
    path = tmp_path / "image.png"
    image.save(path)
    same = [path, str(path), image, np.asarray(image), np.asarray(image).transpose(2, 0, 1)]
    for source in same:
        assert to_rgb(source).tobytes() == image.tobytes()
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        source = Image.new(mode, (6, 4))
        assert to_rgb(source).mode == "RGB" and to_rgb(source).size == (6, 4)
    turned = tmp_path / "turned.jpg"
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(turned, exif=exif)
    assert to_rgb(turned).size == (4, 6)


WHITE, GREY = (255, 255, 255), (128, 128, 128)


def transparent_palette() -> Image.Image:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "pixel"),
    [
        (Image.new("RGBA", (6, 4), (255, 0, 0, 0)), "png", WHITE),
        (Image.new("LA", (6, 4), (0, 0)), "png", WHITE),
        (transparent_palette(), "png", WHITE),
        (Image.new("P", (6, 4), 0), "gif", (0, 0, 0)),
        (Image.fromarray(np.full((4, 6), 65535, dtype=np.uint16)), "png", WHITE),
        (Image.fromarray(np.full((4, 6), 128 * 257, dtype=np.uint16)), "png", GREY),
        (Image.fromarray(np.full((4, 6), 200, dtype=np.uint16)), "png", (1, 1, 1)),
        (Image.new("L", (6, 4), 128), "png", GREY),
        (Image.new("1", (6, 4), 1), "png", WHITE),
        (Image.new("CMYK", (6, 4), (0, 0, 0, 0)), "tiff", WHITE),
        (Image.new("CMYK", (6, 4), (0, 0, 0, 255)), "jpg", (0, 0, 0)),
    ],
)
def test_an_image_is_the_same_from_a_file_and_as_people_see_it(
    tmp_path, image, suffix, pixel
) -> None:
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    for source in (path, str(path), Image.open(path), image):
        opened = to_rgb(source)
        assert (opened.mode, opened.size, opened.getpixel((3, 2))) == ("RGB", (6, 4), pixel)


def test_an_animation_gives_its_first_frame(tmp_path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        for source in (path, Image.open(path)):
            assert to_rgb(source).getpixel((1, 1)) == (255, 0, 0), suffix


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_marks_are_followed(tmp_path, orientation) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("black", (0, 0, 16, 8))  # the dark quarter is top left when upright
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert to_rgb(tmp_path / "turned.png").tobytes() == upright.tobytes()


def test_arrays_of_every_kind() -> None:
    image = picture(4, 6)
    pixels = np.asarray(image)
    alike = [
        pixels.astype(np.int64),
        pixels.astype(np.uint16) * 257,
        pixels / 255,
        torch.from_numpy(pixels / 255).permute(2, 0, 1),
        np.concatenate([pixels, np.full((4, 6, 1), 255, np.uint8)], axis=-1),
    ]
    for array in alike:
        assert to_rgb(array).tobytes() == image.tobytes()
    for shape in ((1, 1, 3), (1, 7, 3), (7, 1, 3), (3, 9, 7), (1, 9, 7), (9, 7), (9, 7, 1)):
        height, width = (shape[1:] if shape in ((3, 9, 7), (1, 9, 7)) else shape)[:2]
        assert to_rgb(np.zeros(shape, np.uint8)).size == (width, height)
    with pytest.raises(ValueError, match=r"float64 holds -255.0 to -255.0"):
        to_rgb(np.full((2, 2, 3), -1.0))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\)"):
        to_rgb(np.zeros((2, 2, 2), np.uint8))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes, st.sampled_from([("pad", "crops"), ("anyres", "crops"), ("anyres", "llava_next")]))
def test_processor_and_model_count_the_same_tokens(processor, size, how) -> None:
    """Without any pixels: what the processor writes is what the model expects."""
    ratio, packing = how
    config = tiny_config(
        vision={"image_size": PX, "patch_size": PATCH},
        image_grid_pinpoints=PINPOINTS,
        start_layer=None if packing == "llava_next" else 1,
        packing=packing,
    )
    processor = copy.copy(processor)
    processor.packing = packing
    crops = processor.crop_layout(size, ratio).num_crops
    pixels = torch.zeros(1, 13, 3, PX, PX, device="meta")
    counts, where = torch.tensor([crops]), torch.tensor([size])
    (grid,) = image_grids(config, pixels, counts, where)
    assert grid.num_crops == crops
    assert grid.num_tokens == processor.num_image_tokens(size, ratio)
    assert [grid.num_tokens] == processor.token_counts({"num_crops": counts, "image_sizes": where})


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 5000), (5000, 1), (2, 3), pytest.param((5000, 5000), marks=pytest.mark.slow)],
)
def test_extreme_images_are_cut_as_counted(processor, size) -> None:
    image = Image.new("RGB", size[::-1], (200, 100, 50))
    for ratio in ("pad", "anyres"):
        inputs = processor.image_inputs(image, ratio)
        assert inputs["num_crops"].tolist() == [processor.crop_layout(size, ratio).num_crops]
        assert bool(torch.isfinite(inputs["pixel_values"]).all())


def test_videos_beside_images_in_the_order_of_the_texts() -> None:
    processor = make_processor(image_aspect_ratio="anyres")
    clip = [picture(20, 30, seed) for seed in range(3)]
    array = np.stack([np.asarray(frame) for frame in clip[:2]])
    inputs = processor(
        text=["a<video>b<image>", "plain", "<image><video>c"],
        images=[picture(40, 60), picture(60, 40)],
        videos=[clip, array],
        padding=True,
        return_tensors="pt",
    )
    crops = [processor.crop_layout(size).num_crops for size in ((40, 60), (60, 40))]
    assert inputs["num_crops"].tolist() == [3, crops[0], crops[1], 2]
    assert inputs["pool_sizes"].tolist() == [2, 1, 1, 2]
    assert inputs["image_sizes"].tolist() == [[20, 30], [40, 60], [60, 40], [20, 30]]
    frame = (SIDE // 2) ** 2 + 1
    whole = SIDE**2 + 1
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [3 * frame + crops[0] * whole, 0, crops[1] * whole + 2 * frame]
    for number, one in enumerate(clip):
        alone = processor.image_inputs(one, "pad")["pixel_values"][0, 0]
        assert torch.equal(inputs["pixel_values"][0, number], alone)
    literal = processor(text="<video>", return_tensors="pt")
    assert literal["input_ids"].shape[1] == len("<video>")  # without videos it is just text
