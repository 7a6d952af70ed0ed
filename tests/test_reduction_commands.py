"""Token reduction from the command line: settings, evaluation of a saved model, calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from small_model import save_small_model

from proxyv.cli import run_command
from proxyv.config import ProxyVConfig
from proxyv.eval.answerer import Answerer
from proxyv.model.flops import RowTokens, layers_flops, paper_flops
from proxyv.reduction.__main__ import main
from proxyv.reduction.options import parse_options
from proxyv.train.build import _options
from proxyv.train.config_files import load_settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method=fastv,layer=2, ratio=0.5", {"method": "fastv", "layer": 2, "ratio": 0.5}),
        ("method=prumerge,plus=false,ratio=null", {"method": "prumerge", "plus": False,
                                                    "ratio": None}),
        ('{"method": "pyramiddrop", "layers": [8, 16]}',
         {"method": "pyramiddrop", "layers": [8, 16]}),
        ("none", None),
    ],
)  # fmt: skip
def test_a_method_as_one_argument(text, expected) -> None:
    assert parse_options(text) == expected


@pytest.mark.parametrize("text", ["fastv", "method=fastv,2", "{method: fastv}"])
def test_another_form_is_refused(text) -> None:
    with pytest.raises(ValueError, match="reduction '"):
        parse_options(text)


def test_training_settings_become_the_models_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {start_layer: null}\n", encoding="utf-8")
    plain = _options(load_settings(path).model)
    assert plain["reduction"] is None
    settings = load_settings(
        path,
        ["model.reduction.method=tokenpacker", "model.reduction.scale=3",
         "model.vision_feature_layer=[12,16,22,23]"],
    )  # fmt: skip
    config = ProxyVConfig(**_options(settings.model))
    assert config.crop_tokens == 64 and config.vision_feature_layer == [12, 16, 22, 23]


METHODS = {
    "method=fastv,layer=1,ratio=0.5": 17,
    "method=prumerge,plus=true": 17,
    "method=visionzip,dominant=5,contextual=2": 8,
    "method=downsample,side=2": 5,
}


@pytest.mark.parametrize("text", METHODS)
def test_a_saved_model_answers_with_a_method(text, tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, start_layer=None, image_aspect_ratio="anyres")
    answerer = Answerer.load(str(folder), device="cpu", reduction=parse_options(text))
    assert answerer.describe()["reduction"] == parse_options(text)
    assert answerer.processor.rows_per_crop == METHODS[text]
    images = [[Image.new("RGB", (60, 30), "red"), Image.new("RGB", (9, 9))],
              [Image.new("RGB", (40, 90), "blue")], []]  # fmt: skip
    questions = ["What colours?", "Why?", "No image"]
    batch = answerer.prepare(questions, images)
    together = answerer.generate(batch, 6)
    alone = [
        answerer.generate(answerer.prepare([question], [own]), 6)[0]
        for question, own in zip(questions, images, strict=True)
    ]
    assert together == alone
    answerer.processor.save_pretrained(tmp_path / "processor")
    again = type(answerer.processor).from_pretrained(tmp_path / "processor")
    assert again.rows_per_crop == METHODS[text]


def conversations(folder: Path, number: int) -> Path:
    """Questions about images of two shapes, and one without an image among them."""
    rows = []
    for index in range(number):
        size = (60, 30) if index % 2 else (40, 90)
        Image.new("RGB", size, ("red", "blue", "green")[index % 3]).save(folder / f"{index}.png")
        said = [
            {"from": "human", "value": "<image>\nWhat colour is it?" + " And why?" * index},
            {"from": "gpt", "value": "red"},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "Paint."},
        ]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": said})
    rows.insert(1, {"id": "text", "conversations": said[2:]})
    path = folder / "conversations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def calibrate_small(folder: Path, *more: str, start_layer: int | None = None) -> int:
    model = save_small_model(folder / "model", start_layer=start_layer, image_aspect_ratio="anyres")
    data = conversations(folder, 3)
    given = ["--model", str(model), "--annotations", str(data), "--images", str(folder)]
    given += ["--device", "cpu", "--samples", "3", "--output", str(folder / "new" / "out.json")]
    return run_command(main, ["calibrate", *given, *more])


def test_a_calibrated_scheme_is_a_reduction_and_saves_what_was_asked(tmp_path, capsys) -> None:
    assert calibrate_small(tmp_path, "--ratio", "0.2", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    text = (tmp_path / "new" / "out.json").read_text(encoding="utf-8")
    options = parse_options(text)
    assert options == summary["reduction"] and options["method"] == "fitprune"
    assert len(options["scheme"]) == 3 and sum(options["scheme"]) > 0
    assert options["calibrated_tokens"] == 3 * 16 and summary["samples"] == 3
    answerer = Answerer.load(str(tmp_path / "model"), device="cpu", reduction=options)
    config = answerer.model.config
    images = [[Image.open(tmp_path / "1.png")]]
    batch = answerer.prepare(["What?"], images)
    assert len(answerer.generate(batch, 3)) == 1
    # Saved by a count of its own: the samples' prompts with and without the scheme.
    shares = []
    for index in range(3):
        question = "What colour is it?" + " And why?" * index
        read = answerer.prepare([question], [[Image.open(tmp_path / f"{index}.png")]]).rows
        crops = int(read["num_crops"][0])
        words = read["input_ids"].shape[1] - crops * 17
        row = RowTokens(crops=crops, text=words)
        config.reduction = options
        reduced = paper_flops(config, row)
        config.reduction = None
        whole = paper_flops(config, row)
        assert whole == layers_flops(config, [crops * 17 + words] * 3)
        shares.append(1 - reduced / whole)
    assert summary["saved"] == pytest.approx(sum(shares) / 3, abs=1e-9)
    assert summary["saved"] > 0.15


def test_calibration_says_what_it_found_and_how_to_use_it(tmp_path, capsys) -> None:
    assert calibrate_small(tmp_path, "--ratio", "0.2") == 0
    said = capsys.readouterr().out
    assert "after each layer go" in said and "--reduction" in said


@pytest.mark.parametrize(
    ("more", "start_layer", "words"),
    [
        (["--samples", "4"], None, ["3 conversations", "--samples is 4"]),
        (["--ratio", "0.999"], None, ["ratio=0.999 cannot be saved"]),
        (["--ratio", "1"], None, ["--ratio 1", "between 0 and 1"]),
        ([], 1, ["start_layer=1", "calibrate a baseline"]),
    ],
)
def test_what_cannot_be_calibrated(tmp_path, capsys, more, start_layer, words) -> None:
    assert calibrate_small(tmp_path, *more, start_layer=start_layer) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "new").exists()
