"""Images and texts to inputs: pixels of the authors' recipe, counts that always agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv import ProxyVProcessor
from proxyv.model.processing import crop_layout, num_image_tokens, to_rgb

PX, PATCH = 28, 7
SIDE = PX // PATCH
PINPOINTS = [[2 * PX, PX], [PX, 2 * PX], [2 * PX, 2 * PX], [PX, 3 * PX], [3 * PX, PX]]


def make_processor(**options) -> ProxyVProcessor:
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
        size={"shortest_edge": PX},
        crop_size={"height": PX, "width": PX},
        image_grid_pinpoints=PINPOINTS,
    )
    return ProxyVProcessor(image_processor=images, tokenizer=tokenizer, patch_size=PATCH, **options)


@pytest.fixture(scope="module")
def processor() -> ProxyVProcessor:
    return make_processor()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalise(image: Image.Image, processor: ProxyVProcessor) -> np.ndarray:
    """Plain restatement: to (3, height, width), /255, mean and deviation."""
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
    mean = np.array(processor.image_processor.image_mean, dtype=np.float32)[:, None, None]
    std = np.array(processor.image_processor.image_std, dtype=np.float32)[:, None, None]
    return (pixels - mean) / std


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (28, 28), (9, 90), (120, 31)])
def test_pad_is_a_square_of_the_mean_colour_resized(processor, size) -> None:
    image = picture(*size)
    inputs = processor.image_inputs(image, "pad")
    longest = max(size)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))
    square.paste(image, ((longest - size[1]) // 2, (longest - size[0]) // 2))
    expected = normalise(square.resize((PX, PX), Image.Resampling.BICUBIC), processor)
    assert inputs["pixel_values"].shape == (1, 1, 3, PX, PX)
    np.testing.assert_allclose(inputs["pixel_values"][0, 0].numpy(), expected, atol=1e-6)
    assert inputs["num_crops"].tolist() == [1]
    assert inputs["image_sizes"].tolist() == [list(size)]


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (28, 28), (9, 90), (120, 31), (57, 29)])
def test_anyres_is_the_thumbnail_and_the_tiles_of_the_best_canvas(processor, size) -> None:
    image = picture(*size)
    cut = processor.crop_layout(size, "anyres")
    inputs = processor.image_inputs(image, "anyres")
    scale = min(cut.canvas_hw[0] / size[0], cut.canvas_hw[1] / size[1])
    if cut.canvas_hw[1] / size[1] < cut.canvas_hw[0] / size[0]:
        new = (min(int(np.ceil(size[0] * scale)), cut.canvas_hw[0]), cut.canvas_hw[1])
    else:
        new = (cut.canvas_hw[0], min(int(np.ceil(size[1] * scale)), cut.canvas_hw[1]))
    canvas = Image.new("RGB", cut.canvas_hw[::-1])
    corner = ((cut.canvas_hw[1] - new[1]) // 2, (cut.canvas_hw[0] - new[0]) // 2)
    canvas.paste(image.resize(new[::-1], Image.Resampling.BICUBIC), corner)
    tiles = [image.resize((PX, PX), Image.Resampling.BICUBIC)] + [
        canvas.crop((x * PX, y * PX, (x + 1) * PX, (y + 1) * PX))
        for y in range(cut.grid_hw[0])
        for x in range(cut.grid_hw[1])
    ]
    expected = np.stack([normalise(tile, processor) for tile in tiles])
    assert inputs["num_crops"].tolist() == [cut.num_crops] == [len(tiles)]
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), expected, atol=1e-6)


def test_the_first_pinpoint_wins_a_tie() -> None:
    square = crop_layout((PX, PX), "anyres", PINPOINTS, PX)
    assert square.canvas_hw == (2 * PX, PX) and square.grid_hw == (2, 1) and square.num_crops == 3
    other = crop_layout((PX, PX), "anyres", PINPOINTS[1:], PX)
    assert other.canvas_hw == (PX, 2 * PX)


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
        ({"text": "a", "videos": [[1]]}, ["0 <video>", "1 videos were given"]),
        ({"text": "<video>", "videos": 3}, ["a video is a int", "list of frames"]),
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
    alpha = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(alpha).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (255, 255, 255)
