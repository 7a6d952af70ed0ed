"""How charts look; the test half has looks that training never shows (not only other values)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from proxyv.synthetic.chart_canvas import Face
from proxyv.synthetic.fonts import families, font_path
from proxyv.synthetic.page import Split, looks_of

__all__ = ["LOOKS", "PALETTES", "Looks", "Style", "draw_style"]

T = TypeVar("T")
TitlePlace = Literal["center", "left", "right", "bottom", "band", "foot", "shade"]
LegendPlace = Literal["top", "bottom", "right", "framed", "side"]

PALETTES: dict[Split, dict[str, dict[str, str]]] = {
    "train": {
        "classic": {
            "blue": "#1f77b4", "orange": "#ff7f0e", "green": "#2ca02c", "red": "#d62728",
            "purple": "#9467bd", "brown": "#8c564b", "pink": "#e377c2", "gray": "#7f7f7f",
        },
        "bright": {
            "blue": "#2255ff", "orange": "#ff9a1f", "green": "#18c418", "red": "#f01818",
            "purple": "#9b30e0", "yellow": "#f7d716", "pink": "#ff6fb5", "black": "#202020",
        },
        "dark": {
            "blue": "#123a7a", "orange": "#c45f00", "green": "#14632a", "red": "#931515",
            "purple": "#54207a", "brown": "#5e3a1c", "gray": "#5a5a5a", "black": "#141414",
        },
    },
    "test": {
        "soft": {
            "blue": "#6a9fd8", "orange": "#f4a868", "green": "#79bf7d", "red": "#e0686a",
            "purple": "#ad8bd0", "yellow": "#ecd668", "pink": "#f0a2c4", "gray": "#a0a0a0",
        },
        "earth": {
            "blue": "#3b6c98", "orange": "#d98032", "green": "#5c8a3a", "red": "#b33a2e",
            "purple": "#74508f", "brown": "#7c5a38", "yellow": "#dcb52c", "black": "#2a2a2a",
        },
    },
}  # fmt: skip


# Colours that would soon bear another name if they were mixed with white or with gray.
SHARPLY_NAMED = ("black", "gray", "brown", "pink")


@dataclass(frozen=True)
class Looks:
    """The choices that one half of the small world draws from.

    Attributes:
        papers: colours of page and plot area.
        spines: letters of left, bottom, right, top.
        faded: how far colours of a chart may be mixed with white or with gray.
    """

    papers: tuple[tuple[str, str], ...]
    inks: tuple[str, ...]
    titles: tuple[TitlePlace, ...]
    legends: tuple[LegendPlace, ...]
    spines: tuple[str, ...]
    grids: tuple[str, ...]
    grid_colors: tuple[str, ...]
    hatches: tuple[str | None, ...]
    edges: tuple[str, ...]
    markers: tuple[str, ...]
    line_styles: tuple[str, ...]
    rings: tuple[float | None, ...]
    bar_shares: tuple[float, float]
    values_inside: float
    faded: float


LOOKS: dict[Split, Looks] = {
    "train": Looks(
        papers=(
            ("#ffffff", "#ffffff"), ("#ffffff", "#f2f2f2"), ("#f7f7f7", "#ffffff"),
            ("#fdf0f0", "#fdf0f0"), ("#f3f3e6", "#ffffff"), ("#e8e8e8", "#f8f8f8"),
            ("#f5edf8", "#f5edf8"), ("#ffffff", "#e4f0ef"),
        ),
        inks=("#000000", "#222222", "#333344", "#401414", "#20204c"),
        titles=("center", "left", "foot", "shade"),
        legends=("top", "bottom", "side"),
        spines=("lb", "lbrt", "b"),
        grids=("-", "--", ""),
        grid_colors=("#c8c8c8", "#d8d8d8", "#b4b4b4"),
        hatches=(None, None, None, "\\\\", "--", "o"),
        edges=("none", "#333333", "#888888"),
        markers=("o", "s", "", "v", "P"),
        line_styles=("-", "-", "-."),
        rings=(None, None, 0.3),
        bar_shares=(0.55, 0.9),
        values_inside=0.4,
        faded=0.4,
    ),
    "test": Looks(
        papers=(
            ("#fff8e7", "#fff8e7"), ("#eaf3fb", "#ffffff"), ("#eef7ee", "#eef7ee"),
            ("#ffffff", "#ece9f5"), ("#f6efe6", "#fffdf8"),
        ),
        inks=("#1c2a3a", "#3a2a1c", "#10301c"),
        titles=("right", "bottom", "band"),
        legends=("right", "framed"),
        spines=("", "l", "br"),
        grids=(":", "-."),
        grid_colors=("#8a8a8a", "#a9b8c8", "#bca98c"),
        hatches=(None, None, "//", "..", "xx"),
        edges=("#000000", "#ffffff", "none"),
        markers=("^", "D"),
        line_styles=("-", "--"),
        rings=(0.45, 0.6, None),
        bar_shares=(0.45, 0.95),
        values_inside=0.5,
        faded=0.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """One chart's look; see :class:`Looks` for what each choice means."""

    paper: str
    plot: str
    ink: str
    title: TitlePlace
    legend: LegendPlace
    spines: str
    grid: str
    grid_color: str
    hatch: str | None
    edge: str
    marker: str
    line_style: str
    ring: float | None
    bar_share: float
    values_inside: bool
    title_face: Face
    face: Face
    small: Face
    colors: tuple[tuple[str, str], ...]  # (name, hex), shuffled


def _one(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _faded(rng: np.random.Generator, name: str, fill: str, most: float) -> str:
    """A shade of a named colour: mixed with white, then with the gray of its own lightness."""
    white, gray = rng.uniform(0.0, most, size=2) * (0.25 if name in SHARPLY_NAMED else 1.0)
    rgb = np.array([int(fill[i : i + 2], 16) for i in (1, 3, 5)])
    rgb = rgb + (255 - rgb) * white
    rgb = rgb + (rgb.mean() - rgb) * gray
    return "#" + "".join(f"{round(float(value)):02x}" for value in rgb)


def draw_style(rng: np.random.Generator, split: Split, size_hw: tuple[int, int]) -> Style:
    """Draw a look of one half; text grows more slowly than the page, so larger pages hold more."""
    half = looks_of(split)
    looks = LOOKS[half]
    family = _one(rng, families(split))
    scale = (min(size_hw) / 168) ** 0.6
    em = round(float(rng.uniform(11.0, 14.0)) * scale * 2) / 2
    regular = str(font_path(family, _one(rng, family.regular)))
    bold = str(font_path(family, _one(rng, family.bold)))
    palette = list(_one(rng, list(PALETTES[half].values())).items())
    paper, plot = _one(rng, looks.papers)
    style = Style(
        paper=paper,
        plot=plot,
        ink=_one(rng, looks.inks),
        title=_one(rng, looks.titles),
        legend=_one(rng, looks.legends),
        spines=_one(rng, looks.spines),
        grid=_one(rng, looks.grids),
        grid_color=_one(rng, looks.grid_colors),
        hatch=_one(rng, looks.hatches),
        edge=_one(rng, looks.edges),
        marker=_one(rng, looks.markers),
        line_style=_one(rng, looks.line_styles),
        ring=_one(rng, looks.rings),
        bar_share=float(rng.uniform(*looks.bar_shares)),
        values_inside=bool(rng.random() < looks.values_inside),
        title_face=Face(bold if rng.random() < 0.6 else regular, em + scale),
        face=Face(regular, em),
        small=Face(regular, max(10.0 * scale, em - scale)),
        colors=tuple(palette[int(i)] for i in rng.permutation(len(palette))),
    )
    if looks.faded and rng.random() < 0.6:
        shades = ((name, _faded(rng, name, fill, looks.faded)) for name, fill in style.colors)
        return replace(style, colors=tuple(shades))
    return style
