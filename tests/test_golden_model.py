"""The authors' numbers on small random models; needs the folder that PROXYV_GOLDEN names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import golden_files
from safetensors import safe_open
from tiny_models import load_released
from torch import Tensor

from proxyv import ProxyVForConditionalGeneration
from proxyv.model.checkpoints import from_released, to_released
from proxyv.model.released import released_config

pytestmark = pytest.mark.golden

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 7,
}


def cases() -> list:
    files = golden_files("model/*.safetensors")
    if not files:
        skip = pytest.mark.skip(reason="PROXYV_GOLDEN names no folder with model/*.safetensors")
        return [pytest.param(None, marks=skip, id="none")]
    return [pytest.param(path, id=path.stem) for path in files]


class Case:
    """One file: a model with the file's weights, and its inputs in our natural order."""

    def __init__(self, path: Path, attention: str) -> None:
        with safe_open(path, "pt") as file:
            self.meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        raw = json.loads(self.meta["config"])
        self.state = {
            name.removeprefix("weight."): tensor
            for name, tensor in tensors.items()
            if name.startswith("weight.")
        }
        self.config = released_config(raw, VISION)
        assert self.config.text_config.model_type == self.meta["kind"]
        self.model = ProxyVForConditionalGeneration(self.config).eval()
        self.model.set_attn_implementation(attention)
        load_released(self.model, self.state)
        self.tensors = tensors
        self.images = [
            tensors[f"in.pixel_values.{k}"]
            for k in range(sum(name.startswith("in.pixel_values.") for name in tensors))
        ]
        self.inputs = self._inputs()

    def _inputs(self) -> dict[str, Tensor]:
        per_crop, token = self.config.rows_per_crop, self.config.image_token_index
        supply, images = iter(self.images), []
        rows, labels = [], []
        names = ("in.input_ids", "in.labels", "out.attention_mask")
        for ids, targets, valid in zip(*(self.tensors[name] for name in names), strict=True):
            if -200 not in ids:  # the authors give a row of text an image, which nothing sees
                next(supply, None)
            row: list[int] = []
            row_labels: list[int] = []
            for value, target in zip(ids.tolist(), targets.tolist(), strict=True):
                if value == -200:
                    images.append(next(supply))
                count = len(images[-1]) * per_crop if value == -200 else 1
                row += [token if value == -200 else value] * count
                row_labels += [-100 if value == -200 else target] * count
            rows.append(row[: int(valid.sum())])  # ids of padding come last
            labels.append(row_labels[: int(valid.sum())])
        assert next(supply, None) is None
        length = max(map(len, rows))
        inputs = {
            "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (length - len(row)) for row in rows]
            ),
            "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
        }
        if images:
            pixels = torch.zeros(len(images), max(map(len, images)), *images[0].shape[1:])
            for target, image in zip(pixels, images, strict=True):
                target[: len(image)] = image
            inputs["pixel_values"] = pixels
            inputs["num_crops"] = torch.tensor([len(image) for image in images])
        return inputs

    def light_rows(self, row: int) -> tuple[list[int], list[int]]:
        """Natural rows and the file's rows of the newline and text tokens of one sample."""
        per_crop, token = self.config.rows_per_crop, self.config.image_token_index
        ids = self.inputs["input_ids"][row].tolist()
        valid = int(self.inputs["attention_mask"][row].sum())
        newlines, text, run = [], [], 0
        for column in range(valid):
            run = run + 1 if ids[column] == token else 0
            if ids[column] != token:
                text.append(column)
            elif run % per_crop == 0:
                newlines.append(column)
        crops = [
            sum(i == token for i in line) // per_crop for line in self.inputs["input_ids"].tolist()
        ]
        newline_block = max(crops) * (per_crop - 1)
        text_block = newline_block + max(crops)
        theirs = [newline_block + i for i in range(len(newlines))]
        theirs += [text_block + i for i in range(len(text))]
        assert self.tensors["out.attention_mask"][row, theirs].all()
        return newlines + text, theirs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("path", cases())
def test_logits_and_loss_are_the_authors(path: Path, attention: str) -> None:
    case = Case(path, attention)
    with torch.no_grad():
        outputs = case.model(**case.inputs)
    for row in range(len(case.inputs["input_ids"])):
        ours, theirs = case.light_rows(row)
        expected = case.tensors["out.logits"][row, theirs]
        torch.testing.assert_close(outputs.logits[row, ours], expected, atol=1e-4, rtol=0)
    assert abs(float(outputs.loss) - float(case.meta["loss"])) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("path", cases())
def test_greedy_ids_are_the_authors(path: Path, attention: str) -> None:
    case = Case(path, attention)
    if "out.generated_ids" not in case.tensors:
        pytest.skip("the case has no generated ids")
    expected = case.tensors["out.generated_ids"]
    inputs = {name: value for name, value in case.inputs.items() if name != "labels"}
    result = case.model.generate(
        **inputs,
        max_new_tokens=expected.shape[1],
        min_new_tokens=expected.shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = result.sequences[:, inputs["input_ids"].shape[1] :]
    assert ids.tolist() == expected.tolist()
    scores = torch.stack(result.scores, dim=1)
    torch.testing.assert_close(scores, case.tensors["out.generation_scores"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", cases())
def test_released_names_come_back_bit_equal(path: Path) -> None:
    case = Case(path, "eager")
    back = to_released(case.model.state_dict(), case.config.start_layer)
    assert back.keys() == case.state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in case.state.items())
    ours = from_released(case.state, case.config.start_layer)
    assert ours.keys() == case.model.state_dict().keys()
