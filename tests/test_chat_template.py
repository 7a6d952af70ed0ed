"""apply_chat_template and transformers' pipeline: the ids that training and evaluation see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from small_model import CROP_PX, PATCH_PX, character_tokenizer, save_small_model
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv import ProxyVProcessor
from proxyv.data.templates import TEMPLATES, Renderer, mark_template

TOKENIZERS = os.environ.get("PROXYV_TOKENIZERS")
REAL = [("vicuna", "v1"), ("llama3", "llama3"), ("qwen2", "qwen"), ("phi3", "phi3")]


def processor_of(tokenizer, template: str) -> ProxyVProcessor:
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    mark_template(tokenizer, TEMPLATES[template])
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": CROP_PX},
        crop_size={"height": CROP_PX, "width": CROP_PX},
        image_grid_pinpoints=[[CROP_PX, 2 * CROP_PX], [2 * CROP_PX, CROP_PX]],
    )
    chat = TEMPLATES[template].chat_template()
    return ProxyVProcessor(images, tokenizer, patch_size=PATCH_PX, chat_template=chat)


def picture(height: int = 20, width: int = 30) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def chat(image: Image.Image, *, answered: bool = False) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    if answered:
        messages += [
            {"role": "assistant", "content": [{"type": "text", "text": "A page."}]},
            {"role": "user", "content": [{"type": "text", "text": "Which one?"}]},
        ]
    return messages


def plain(messages: list[dict]) -> list[dict]:
    """The same messages as one text each, as the data has them."""
    texts = [
        "".join("<image>\n" if part["type"] == "image" else part["text"] for part in m["content"])
        for m in messages
    ]
    return [{"role": m["role"], "content": t} for m, t in zip(messages, texts, strict=True)]


def check_ids(processor: ProxyVProcessor) -> None:
    image = picture()
    for answered in (False, True):
        messages = chat(image, answered=answered)
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        renderer = Renderer(processor.tokenizer, image_token_id=processor.image_token_id)
        lengths = processor.token_counts(processor.image_inputs(image))
        assert inputs["input_ids"][0].tolist() == renderer.prompt(plain(messages), lengths)
        expected = processor.image_inputs(image)
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["num_crops"], expected["num_crops"])


def test_ids_are_those_of_training_tiny() -> None:
    check_ids(processor_of(character_tokenizer(), "tiny"))


@pytest.mark.golden
@pytest.mark.skipif(not TOKENIZERS, reason="PROXYV_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize(("name", "template"), REAL)
def test_ids_are_those_of_training_real(name, template) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(TOKENIZERS or "", name))
    check_ids(processor_of(tokenizer, template))


def test_a_batch_of_chats_with_and_without_images(tmp_path) -> None:
    processor = processor_of(character_tokenizer(), "tiny")
    text_only = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    inputs = processor.apply_chat_template(
        [chat(picture(20, 30)), text_only, chat(picture(60, 20))],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", "image_aspect_ratio": "pad"},
    )
    tokens = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert tokens == [17, 0, 17] and inputs["num_crops"].tolist() == [1, 1]
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][1, -1] == 1


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_system_message_is_one_text_in_either_form_or_refused(name) -> None:
    processor = processor_of(character_tokenizer(), name)
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    user = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}

    def written(content: str | list[dict[str, str]]) -> str:
        return processor.apply_chat_template([{"role": "system", "content": content}, user])

    if TEMPLATES[name].system:
        assert written(parts) == written("Be brief.")
        assert "Be brief." in written(parts) and "{" not in written(parts)
        return
    for content in ("Be brief.", parts):
        with pytest.raises(TemplateError, match=f"'{name}' has no place for a system message"):
            written(content)


def test_the_saved_processor_keeps_its_template(tmp_path) -> None:
    processor_of(character_tokenizer(), "tiny").save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == TEMPLATES["tiny"].chat_template()
    check_ids(loaded)


@pytest.mark.parametrize("ratio", ["pad", "anyres"])
def test_the_pipeline_answers_as_the_model_does(ratio, tmp_path) -> None:
    folder = save_small_model(tmp_path, start_layer=1, image_aspect_ratio=ratio)
    pipe = pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    chosen = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for size in ((20, 30), (70, 30)):
        messages = chat(picture(*size))
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        new = model.generate(**inputs, **chosen)[:, inputs["input_ids"].shape[1] :]
        expected = processor.batch_decode(new, skip_special_tokens=True)[0]
        got = pipe(text=messages, return_full_text=False, generate_kwargs=chosen)
        assert got[0]["generated_text"] == expected
    plain_call = pipe(images=picture(), text="<image>\nHi", generate_kwargs=chosen)
    assert plain_call[0]["generated_text"]
