"""Controls that show whether a model reads the picture: change the image, keep the question.

A score that stays up when the image is another document's, or grey, or absent, was earned by
guessing from the question.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from PIL import Image

from proxyv.cli import CommandError, nearest

__all__ = ["CONTROLS", "blank_like", "check_control", "derange"]

CONTROLS = ("shuffled-images", "blank-images", "question-only")
MID_GREY = (128, 128, 128)


def check_control(control: str | None) -> str | None:
    """Return the control's name; an unknown one is an error that names the nearest."""
    if control is not None and control not in CONTROLS:
        raise CommandError(nearest("control", control, CONTROLS))
    return control


def blank_like(size_hw: tuple[int, int]) -> Image.Image:
    """A mid-grey RGB image of the given height and width."""
    height, width = size_hw
    return Image.new("RGB", (width, height), MID_GREY)


def derange(owners: Sequence[Sequence[Hashable]], seed: int = 0) -> list[int]:
    """Give each position another one to take its image from, never one of the same document.

    Positions that share any key (document id, or hash of the image) show the same document. They
    are put side by side, in random order, and everything is turned by the size of the largest
    document: no position then meets its own document.

    Args:
        owners: for each position, the keys of its document.
        seed: seed of the random order.

    Returns:
        A permutation; entry i is the position whose image question i gets.

    Raises:
        ValueError: one document owns more than half of the positions.
    """
    documents = _join(owners)
    members: dict[int, list[int]] = {}
    for position, document in enumerate(documents):
        members.setdefault(document, []).append(position)
    blocks = list(members.values())
    turn = max(map(len, blocks), default=0)
    if 2 * turn > len(owners):
        raise ValueError(
            f"images cannot be shuffled: {turn} of {len(owners)} questions are about one "
            "document; take more rows"
        )
    order = random.Random(seed)
    order.shuffle(blocks)
    for block in blocks:
        order.shuffle(block)
    line = [position for block in blocks for position in block]
    partner = [0] * len(line)
    for place, position in enumerate(line):
        partner[position] = line[(place + turn) % len(line)]
    return partner


def _join(owners: Sequence[Sequence[Hashable]]) -> list[int]:
    """Number the groups of positions that share keys, directly or through others."""
    parent = list(range(len(owners)))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    first: dict[Hashable, int] = {}
    for position, keys in enumerate(owners):
        for key in keys:
            parent[root(position)] = root(first.setdefault(key, position))
    return [root(position) for position in range(len(owners))]
