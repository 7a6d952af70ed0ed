"""Stock LLaVA-NeXT checkpoints by the evaluation command, as transformers itself answers.

A model of this package never writes an image token; the random stock one is told not to.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from proxyv.cli import run_command
from proxyv.eval.__main__ import main
from proxyv.eval.answerer import Answerer
from proxyv.eval.images import row_images
from proxyv.eval.records import read_records
from proxyv.eval.sources import load_rows
from proxyv.model.stock import suggested_template
from tests.test_convert import llava_next  # noqa: F401 - a fixture
from tests.test_eval import DOCVQA, document_rows, png, save_parquet

V1 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %} {% endfor %}ASSISTANT:"
)


def write_rows(folder: Path) -> Path:
    rows = document_rows(6)
    for index, row in enumerate(rows):
        shape = ((20, 60), (60, 20), (70, 70))[index % 3]
        row["image"]["bytes"] = png(40 * index, shape)
    save_parquet(folder / "docvqa/validation.parquet", rows)
    return folder


def test_stock_answers_are_those_of_transformers(
    llava_next: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = write_rows(tmp_path / "data")
    command = ["--model", str(llava_next), "--data", str(data), "--tasks", "docvqa"]
    command += ["--template", "tiny", "--device", "cpu", "--batch-size", "1"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 0
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert results["config"]["start_layer"] is None
    assert results["config"]["packing"] == "llava_next"
    stock = LlavaNextForConditionalGeneration.from_pretrained(llava_next).eval()
    theirs = AutoProcessor.from_pretrained(llava_next, backend="pil")
    rows = load_rows(DOCVQA, data)
    for record in read_records(tmp_path / "out/docvqa.jsonl"):
        [image] = [image.load() for image in row_images(DOCVQA, rows, record["index"])]
        text = f"<s><|user|><image>\n{record['prompt']}<|assistant|>"
        inputs = theirs(
            images=image, text=text, return_tensors="pt", text_kwargs={"add_special_tokens": False}
        )
        with torch.inference_mode():
            ids = stock.generate(
                **inputs, do_sample=False, max_new_tokens=32,
                suppress_tokens=[stock.config.image_token_id],
            )  # fmt: skip
        new = ids[:, inputs["input_ids"].shape[1] :]
        expected = theirs.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()
        assert record["answer"] == expected


def test_the_chat_template_is_recognised_by_what_it_writes(llava_next: Path) -> None:  # noqa: F811
    processor = AutoProcessor.from_pretrained(llava_next)
    for template, name in (
        (V1, "v1"),
        ("<|start_header_id|>{{ messages[0]['role'] }}<|end_header_id|>", "llama3"),
        ("[INST] {{ messages[0]['content'][0]['text'] }} [/INST]", None),
        ("{{ 'a' + messages[0]['content'] }}", None),
        (None, None),
    ):
        processor.chat_template = template
        assert suggested_template(processor) == name


def test_an_unknown_chat_template_must_be_named(
    llava_next: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows(tmp_path / "data")
    command = ["--model", str(llava_next), "--data", str(data), "--tasks", "docvqa"]
    assert run_command(main, [*command, "--output", str(tmp_path / "out")]) == 2
    assert "name one with --template" in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        Answerer.load(str(llava_next), template="tinny")
