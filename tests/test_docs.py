"""The Python blocks of the documents run as they stand, in a folder like the repository's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_model import save_small_model
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the quickstart leaves, a small random model in place of its own."""
    save_small_model(tmp_path / "runs/quickstart/finetune", image_aspect_ratio="anyres")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme(place: Path) -> None:
    names: dict = {}
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["model"].config.start_layer == 1 and names["processor"].side == 4


def test_the_model_in_python(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    for block in blocks("docs/model.md"):
        exec(compile(block, "docs/model.md", "exec"), names)
    assert capsys.readouterr().out.strip()  # an answer was printed
    assert (place / "runs/copy/config.json").is_file() and "publish" in names

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=2)
    CLIPVisionModel(vision).save_pretrained(place / "vision")
    language = LlamaConfig(**sizes, num_hidden_layers=13, vocab_size=60)
    LlamaForCausalLM(language).save_pretrained(place / "language")
    assert names["build"](place / "vision", place / "language", 59).config.start_layer == 12
