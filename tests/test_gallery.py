"""The failure gallery: which questions, which patches are drawn, and the page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proxyv.cli import run_command
from proxyv.eval.answerer import Answerer
from proxyv.reduction.tower import tower_states
from proxyv.study.__main__ import main
from proxyv.study.kept import draw_kept, kept_patches
from tests.small_model import CROP_PX, PATCH_PX, save_small_model
from tests.small_world import (
    SIZES,
    answer_rightly,
    evaluate_small,
    example,
    random_picture,
    write_docvqa,
)

SIDE = CROP_PX // PATCH_PX
FASTV = {"method": "fastv", "layer": 1, "ratio": 0.75}
INSIDE = {"method": "pyramiddrop", "layers": [1, 2], "ratios": [0.75, 0.25]}
PRUMERGE = {"method": "prumerge"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    common = {"start_layer": None, "image_aspect_ratio": "anyres"}
    return {
        "fastv": save_small_model(folder / "fastv", reduction=FASTV, **common),
        "prumerge": save_small_model(folder / "prumerge", reduction=PRUMERGE, **common),
        "proxies": save_small_model(
            folder / "proxies",
            proxy_kind="learned",
            learned_proxies=3,
            reduction=INSIDE,
            image_aspect_ratio="anyres",
        ),
        "plain": save_small_model(folder / "plain", **common),
    }


def picture() -> Image.Image:
    return random_picture(0, (60, 30))


def load(folder: Path) -> Answerer:
    return Answerer.load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["fastv", "proxies"])
def test_patches_that_a_drop_in_the_decoder_leaves(name, folders: dict[str, Path]) -> None:
    kept = kept_patches(load(folders[name]), "What?", [picture()])
    assert kept is not None and kept.shape == (3, SIDE, SIDE)
    assert int(kept.sum()) == 3 * SIDE**2 // 4  # another number than is dropped


def test_a_model_that_drops_nothing_has_no_picture_of_it(folders: dict[str, Path]) -> None:
    assert kept_patches(load(folders["plain"]), "What?", [picture()]) is None


def test_patches_that_a_drop_in_the_tower_leaves(folders: dict[str, Path]) -> None:
    answerer = load(folders["prumerge"])
    kept = kept_patches(answerer, "What?", [picture()])
    model = answerer.model.model
    pixels = answerer.prepare(["What?"], [[picture()]]).rows["pixel_values"][0]
    with torch.no_grad():
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        layer = model.config.vision_feature_layer
        method = model.config.reduction_method
        found = method.reduce(tower_states(model.vision_tower, states, method, layer, True))
    assert kept is not None
    for crop, origin, valid in zip(kept, found.origin.tolist(), found.valid.tolist(), strict=True):
        expected = {o for o, v in zip(origin, valid, strict=True) if v and o >= 0}
        assert expected == set(crop.flatten().nonzero().flatten().tolist())
        assert expected


def test_dropped_patches_are_pale(folders: dict[str, Path]) -> None:
    answerer = load(folders["fastv"])
    black = Image.new("RGB", (60, 30))
    kept = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    kept[0, 1, 2] = kept[2, 0, 0] = True
    drawn = np.asarray(draw_kept(answerer, black, kept).convert("L"), dtype=int)
    patch = PATCH_PX // 2  # the middle of a patch
    assert drawn[PATCH_PX + patch, 2 * PATCH_PX + patch] < 10
    assert drawn[PATCH_PX + patch, 3 * PATCH_PX + patch] > 180
    second = drawn.shape[1] - CROP_PX  # where the last tile begins
    assert drawn[patch, second + patch] < 10 < 180 < drawn[patch, second + PATCH_PX + patch]
    plain = np.asarray(draw_kept(answerer, black, None).convert("L"), dtype=int)
    assert plain[:, :CROP_PX].max() < 10


@pytest.fixture
def two_runs(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs where the example has them: FastV answers two questions rightly, ProxyV five."""
    monkeypatch.chdir(tmp_path)
    write_docvqa(tmp_path / "data", SIZES)
    for name, model, right in (("fastv", "fastv", 2), ("proxyv", "plain", 5)):
        folder = tmp_path / "runs/eval" / name
        assert evaluate_small(folders[model], tmp_path / "data", folder) == 0
        answer_rightly(folder, right)
    return tmp_path


def test_the_page_shows_what_reduction_gets_wrong(
    two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = example("gallery")
    assert main([*command, "--samples", "2", "--device", "cpu"]) == 0
    page = (two_runs / "runs/study/gallery.html").read_text("utf-8")
    assert "2 of 3 questions that fastv gets wrong" in page
    assert f"of {len(SIZES)} that both were asked" in page
    assert re.findall(r"docvqa, question (\d)", page) == ["2", "3"]
    assert page.count("data:image/jpeg;base64,") == 2
    assert re.search(r"\d+ of 16 patches kept", page) or re.search(r"of 48 patches kept", page)
    assert "http://" not in page and "<script" not in page

    capsys.readouterr()
    assert run_command(main, ["gallery", *command[:0:-1]]) == 2
    assert "its model has no token reduction" in capsys.readouterr().err


def test_only_the_picture_that_was_asked_about_is_shown(
    two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three questions the data has another picture, the same one, and no row any more."""
    write_docvqa(two_runs / "other", [*SIZES[:2], (44, 44), SIZES[3]])
    capsys.readouterr()
    given = ["--data", str(two_runs / "other"), "--device", "cpu"]
    assert run_command(main, [*example("gallery"), *given]) == 0
    page = (two_runs / "runs/study/gallery.html").read_text("utf-8")
    assert re.findall(r"docvqa, question (\d)", page) == ["2", "3", "4"]
    assert re.findall(r'(image of question 3"|no picture)', page) == [
        *("no picture", 'image of question 3"', "no picture")
    ]
    told = capsys.readouterr().err
    assert re.search(r"question 2: no picture \(row 2 of .* is not what the run was asked", told)
    assert re.search(r"question 4: no picture \(.* has 4 rows, the run was asked row 4\)", told)
