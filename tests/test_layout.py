"""Where every token sits: each natural row is covered once, positions as the layout says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyv.model.crops import ImageGrid
from proxyv.model.image_spans import find_images
from proxyv.model.layout import SequenceLayout
from proxyv.model.layout_builder import build_layout

SIDE, REDUCE = 4, 2
PER_CROP = SIDE * SIDE + 1

rows = st.lists(  # one batch row: text lengths (integers) and crops of images (strings)
    st.one_of(st.integers(1, 5), st.integers(1, 4).map(str)), min_size=1, max_size=4
)
batches = st.lists(rows, min_size=1, max_size=4)


def grids(crops: list[int], side: int = SIDE) -> list[ImageGrid]:
    return [ImageGrid(count, side, count * (side**2 + 1)) for count in crops]


def masks(batch: list[list[int | str]], side: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Image mask, real mask and crops of a batch."""
    lines = []
    for row in batch:
        lines.append([])
        for part in row:
            is_image = isinstance(part, str)
            lines[-1] += [is_image] * (int(part) * PER_CROP if is_image else part)
    length = max(map(len, lines))
    image = torch.zeros(len(lines), length, dtype=torch.bool)
    real = torch.zeros_like(image)
    for index, line in enumerate(lines):
        where = slice(0, len(line)) if side == "right" else slice(length - len(line), length)
        image[index, where] = torch.tensor(line)
        real[index, where] = True
    crops = [int(part) for row in batch for part in row if isinstance(part, str)]
    return image, real, crops


def lay_out(batch, side="right", released=False) -> tuple[SequenceLayout, torch.Tensor]:
    image, real, crops = masks(batch, side)
    spans = find_images(image, grids(crops))
    return build_layout(spans, real, lambda side: (side // REDUCE) ** 2, released=released), real


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches, st.sampled_from(["left", "right"]), st.booleans())
def test_streams_cover_every_real_row_once_and_join_back(batch, side, released) -> None:
    layout, real = lay_out(batch, side, released)
    B, S = real.shape
    for row in range(B):
        full = layout.full_index[row][layout.full_valid[row]].tolist()
        light = layout.light_index[row][layout.light_valid[row]].tolist()
        assert sorted(full + light) == real[row].nonzero().flatten().tolist()
        assert len(full) % (SIDE * SIDE) == 0
        assert int(layout.proxy_valid[row].sum()) * REDUCE**2 == len(full)
    hidden = torch.randn(B, S, 3)
    joined = layout.join(*layout.split(hidden))
    assert joined.shape == (B, S, 3)
    assert torch.equal(joined[real], hidden[real])
    heads = torch.randn(B, 2, S, 3)
    streams = [layout.split(heads[:, head]) for head in range(2)]
    both = [torch.stack(parts, dim=1) for parts in zip(*streams, strict=True)]
    assert torch.equal(layout.join(*both).transpose(1, 2)[real], heads.transpose(1, 2)[real])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batches, st.booleans())
def test_positions(batch, released) -> None:
    layout, _real = lay_out(batch, "right", released)
    slots, anchor = layout.slots, layout.proxy_anchor
    for row, parts in enumerate(batch):
        column, first_proxy = 0, 0
        for part in parts:
            if not isinstance(part, str):
                assert slots[row, column : column + part].tolist() == list(
                    range(column, column + part)
                )
                column += part
                continue
            count = int(part) * (SIDE // REDUCE) ** 2
            mine = slice(first_proxy, first_proxy + count)
            assert layout.proxy_slots()[row, mine].tolist() == list(range(column, column + count))
            assert (anchor[row, mine] == column).all()
            first_proxy += count
            for crop in range(int(part)):
                newline = column + SIDE * SIDE
                assert slots[row, column:newline].tolist() == list(range(column, newline))
                early = PER_CROP if released and crop else 0
                assert int(slots[row, newline]) == newline - early
                column += PER_CROP


def test_released_positions_of_five_crops_are_the_documented_ones() -> None:
    layout, _ = lay_out([[7, "5", 3]], released=True)
    newlines = [7 + PER_CROP * crop + SIDE * SIDE for crop in range(5)]
    base = 7 + SIDE * SIDE
    assert layout.slots[0, newlines].tolist() == [base, *(base + PER_CROP * c for c in range(4))]


@pytest.mark.parametrize(("side", "block"), [(4, 2), (6, 3), (4, 4), (4, 1)])
def test_proxies_of_blocks_sit_in_their_middles(side: int, block: int) -> None:
    """Of an even block, at the last of its middle four; one proxy for each block of each crop."""
    image = torch.arange(2 + 2 * (side**2 + 1)) >= 2  # text, then two crops
    spans = find_images(image[None], grids([2], side))
    real = torch.ones_like(image)[None]
    layout = build_layout(spans, real, lambda side: (side // block) ** 2, block=block)
    expected = []
    for crop in range(2):
        first = 2 + crop * (side**2 + 1)
        for y in range(0, side, block):
            for x in range(0, side, block):
                rows = [first + (y + i) * side + x + j for i in range(block) for j in range(block)]
                middle = {1: 0, 2: 3, 3: 4, 4: 10}[block]  # of the block in raster order
                expected.append(rows[middle])
    positions = 100 + torch.arange(len(image))[None]
    assert layout.proxy_positions(positions)[0].tolist() == [100 + row for row in expected]


def test_segments_only_where_all_rows_are_alike() -> None:
    assert lay_out([[2, "2", 3]])[0].segments == (
        (False, 0, 2), (True, 0, 16), (False, 2, 3), (True, 16, 32), (False, 3, 7)
    )  # fmt: skip
    assert lay_out([[2, "1"], [2, "1"]])[0].segments is not None
    assert lay_out([[2, "1"], [1, "1"]])[0].segments is None
    assert lay_out([[2, "1", 1], [1, "1", 2]])[0].segments is None  # as many rows, elsewhere


def test_moving_keeps_everything() -> None:
    layout, _ = lay_out([[2, "1", 1]])
    moved = layout.to("meta")
    assert moved.slots.device.type == "meta" and moved.segments == layout.segments


@pytest.mark.parametrize(
    ("batch", "crops", "words"),
    [
        ([[1, "2", 1]], [1], ["row 0", "17 image tokens more", "1 images"]),
        ([[1, "2", 1]], [3], ["image 0 with 3 crops", "51 consecutive", "34 image tokens"]),
        ([[1, "2", 1]], [2, 1], ["2 images were given", "for 1 only"]),
        ([[1, "1", 1, "1"]], [2], ["image 0 with 2 crops", "column 1"]),
        ([[1, "1"], [1, "2"]], [2, 1], ["row 0", "image 0 with 2 crops"]),
        ([[3]], [1], ["1 images were given", "for 0 only"]),
    ],
)
def test_tokens_and_images_that_do_not_fit_are_refused(batch, crops, words) -> None:
    image, _, _ = masks(batch, "right")
    with pytest.raises(ValueError) as error:
        find_images(image, grids(crops))
    for word in words:
        assert word in str(error.value)


def test_adjacent_images_are_told_apart() -> None:
    image, _, _ = masks([["2", "1"]], "right")
    spans = find_images(image, grids([2, 1]))
    assert [(span.start, span.grid.num_crops) for span in spans[0]] == [(0, 2), (34, 1)]
