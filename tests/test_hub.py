"""Pushing to a model hub and loading from it by name, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_stand_in import Hub
from small_model import save_small_model

from proxyv.convert import main as convert

USER = """
import sys, torch
import proxyv
from proxyv import ProxyVForConditionalGeneration, ProxyVProcessor
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from PIL import Image

folder = sys.argv[1]
own = AutoModelForImageTextToText.from_pretrained(folder)
own.push_to_hub("someone/small", token="hf_any")
AutoProcessor.from_pretrained(folder).push_to_hub("someone/small", token="hf_any")
own.push_to_hub("someone/small", token="hf_any", commit_message="again")

image = Image.effect_noise((50, 70), 90).convert("RGB")
question = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
messages = [{"role": "user", "content": question}]
processor = AutoProcessor.from_pretrained("someone/small")
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
pushed = AutoModelForImageTextToText.from_pretrained("someone/small")
assert torch.equal(pushed(**inputs).logits, own(**inputs).logits)
answer = pipeline("image-text-to-text", model="someone/small")(text=messages, max_new_tokens=2)
assert answer[0]["generated_text"][-1]["role"] == "assistant"

release = "craigwu/proxyv_vicuna_7b_layer12"
theirs = ProxyVForConditionalGeneration.from_pretrained(release)
assert theirs.config.layout == "released" and theirs.config.start_layer == 1
released = ProxyVForConditionalGeneration.from_pretrained(folder, layout="released")
inputs = ProxyVProcessor.from_pretrained(release).apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
assert torch.equal(theirs(**inputs).logits, released(**inputs).logits)
try:
    ProxyVForConditionalGeneration.from_pretrained(release, start_layer=2)
except ValueError as error:
    assert "start_layer=1" in str(error), error
else:
    raise AssertionError("another start layer was accepted")
"""


def test_push_load_by_name_and_the_authors_release(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "small", start_layer=1)
    assert convert([str(folder), str(tmp_path / "release")]) == 0
    raw = json.loads((tmp_path / "release/config.json").read_text())
    del raw["proxyv_options"]  # as the authors wrote it, so with the released positions
    with Hub() as hub:
        hub.repos["craigwu/proxyv_vicuna_7b_layer12"] = {
            path.name: path.read_bytes() for path in (tmp_path / "release").iterdir()
        } | {"config.json": json.dumps(raw).encode()}
        offline = {name: "" for name in os.environ if name.endswith("_OFFLINE")}
        done = subprocess.run(
            [sys.executable, "-c", USER, str(folder)],
            env={
                **os.environ,
                **offline,
                "HF_ENDPOINT": hub.address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
                "no_proxy": "127.0.0.1",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        files, pushes = hub.repos["someone/small"], hub.pushes["someone/small"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert "| `start_layer` | 1 |" in card and 'from_pretrained("someone/small")' in card
    assert pushes == 4  # the card once; model, processor and model again
