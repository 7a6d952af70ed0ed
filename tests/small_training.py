"""Small random backbones and a handful of pictures, for tests that really train."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from proxyv.train.stage0.tokenizer import build_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}
SHAPES = ("disc", "box")


def make_backbones(folder: Path, seed: int = 0) -> None:
    """Write a 56-pixel CLIP tower (8 x 8 patches) and a 4-layer Llama, both random."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=7,
        )
    )
    tower.save_pretrained(folder / "vision")
    tokenizer = build_tokenizer()
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")


def make_rows(folder: Path, number: int = 8, text_only: int = 0) -> Path:
    """Write pictures of one coloured shape and questions about them; returns the JSON file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    rows = []
    for index in range(number):
        colour, shape = list(COLOURS)[index % 4], SHAPES[index // 4 % 2]
        image = Image.new("RGB", (56 + 8 * rng.randrange(3), 56), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "disc" else draw.rectangle)((8, 8, 48, 48), COLOURS[colour])
        image.save(folder / "images" / f"{index}.png")
        rows.append(
            {
                "id": f"row-{index}",
                "image": f"images/{index}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhich colour?"},
                    {"from": "gpt", "value": colour},
                    {"from": "human", "value": "Which shape?"},
                    {"from": "gpt", "value": shape},
                ],
            }
        )
    for index in range(text_only):
        mark = "~" if index == 0 else ""  # a character that no other row has
        said = [
            {"from": "human", "value": f"Say {index}{mark}."},
            {"from": "gpt", "value": f"{index}!"},
        ]
        rows.append({"id": f"text-{index}", "conversations": said})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def break_token(folder: Path, token: str) -> Path:
    """A copy of the language model in which one token gives NaN; returns its folder."""
    model = LlamaForCausalLM.from_pretrained(folder / "language")
    tokenizer = build_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = float("nan")
    model.save_pretrained(folder / "broken-language")
    tokenizer.save_pretrained(folder / "broken-language")
    return folder / "broken-language"


def overrides(folder: Path, **more: object) -> list[str]:
    """Overrides of the tiny preset that train the small backbones on the small rows."""
    values = {
        "model.language": folder / "language",
        "model.vision": folder / "vision",
        "model.projector": "null",
        "model.start_layer": 1,
        "model.side_reduction": 4,
        "data.annotations": folder / "rows.json",
        "data.images": folder,
        "data.workers": 0,
        "optim.global_batch": 4,
        "optim.micro_batch": 2,
        "run.log_steps": 1,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]
