"""Token reduction from the command line: training settings, evaluation of a saved model."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from small_model import save_small_model

from proxyv.config import ProxyVConfig
from proxyv.eval.answerer import Answerer
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
    assert answerer.processor.tokens_per_crop == METHODS[text]
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
    assert again.tokens_per_crop == METHODS[text]
