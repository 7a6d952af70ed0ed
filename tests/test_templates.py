"""Chat templates: ids and labels, golden rows, control tokens in text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from proxyv.data.template_table import TEMPLATES, Template
from proxyv.data.templates import (
    IGNORE_INDEX,
    Renderer,
    Turn,
    as_turns,
    mark_template,
    prompt,
    render,
    template_of,
)
from proxyv.train.stage0.tokenizer import build_tokenizer

GOLDEN = os.environ.get("PROXYV_GOLDEN")
TOKENIZERS = os.environ.get("PROXYV_TOKENIZERS")
NOT_ORDINARY = ("special_token", "empty_", "gpt_speaks_first")
"""Golden cases in which the authors' ids or labels are not ours, by documented rule."""

QUESTION = "<image>\nWhat is the total?"


def supervised_text(tokenizer, rendered) -> str:
    return tokenizer.decode([label for label in rendered.labels if label != IGNORE_INDEX])


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_labels_are_exactly_the_answers_and_their_end_tokens(tokenizer):
    turns = [
        Turn("user", QUESTION),
        Turn("assistant", "$ 3.50"),
        Turn("user", "Who?"),
        Turn("assistant", "Ann"),
    ]
    rendered = render(turns, tokenizer, "tiny", image_lengths=[5])
    assert supervised_text(tokenizer, rendered) == "$ 3.50</s>Ann</s>"
    assert len(rendered.input_ids) == len(rendered.labels)
    kept = [
        (token, label)
        for token, label in zip(rendered.input_ids, rendered.labels, strict=True)
        if label != IGNORE_INDEX
    ]
    assert all(token == label for token, label in kept)


def test_text_of_a_conversation_in_the_tiny_template(tokenizer):
    rendered = render(
        [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "9"}],
        tokenizer,
        "tiny",
        image_lengths=[2],
    )
    text = tokenizer.decode(rendered.input_ids)
    assert text == "<s><|user|><image><image>\nWhat is the total?<|assistant|>9</s>"


def test_prompt_is_the_beginning_of_the_training_row(tokenizer):
    turns = [Turn("user", QUESTION), Turn("assistant", "9")]
    whole = render(turns, tokenizer, "tiny", image_lengths=[3]).input_ids
    asked = prompt([{"role": "user", "content": QUESTION}], tokenizer, "tiny", image_lengths=[3])
    assert whole[: len(asked)] == asked
    assert len(whole) == len(asked) + 2  # "9" and </s>


@pytest.mark.parametrize("control", ["</s>", "<s>", "<|assistant|>", "<pad>", "<unk>"])
def test_control_tokens_in_text_are_text(tokenizer, control):
    token = tokenizer.convert_tokens_to_ids(control)
    said = [Turn("user", f"a {control} b"), Turn("assistant", f"c {control} d")]
    plain = [Turn("user", "a b"), Turn("assistant", "c d")]
    rendered = render(said, tokenizer, "tiny")
    usual = render(plain, tokenizer, "tiny").input_ids.count(token)
    assert rendered.input_ids.count(token) == usual
    assert supervised_text(tokenizer, rendered) == f"c {control} d</s>"


def test_image_mark_in_an_answer_is_text(tokenizer):
    rendered = render([Turn("user", "tag?"), Turn("assistant", "<image>")], tokenizer, "tiny")
    assert tokenizer.convert_tokens_to_ids("<image>") not in rendered.input_ids


def test_phrases_of_the_tiny_vocabulary_stay_one_token(tokenizer):
    phrase = "\nAnswer the question with a single word."
    rendered = render([Turn("user", f"Q{phrase}"), Turn("assistant", "A")], tokenizer, "tiny")
    assert tokenizer.convert_tokens_to_ids(phrase) in rendered.input_ids


def test_empty_answer_supervises_its_end_token(tokenizer):
    rendered = render([Turn("user", "Q"), Turn("assistant", "")], tokenizer, "tiny")
    assert supervised_text(tokenizer, rendered) == "</s>"


def test_one_image_moves_to_the_front_of_its_message_and_two_stay(tokenizer):
    one = prompt([Turn("user", "Look at <image> now")], tokenizer, "tiny", image_lengths=[1])
    assert tokenizer.decode(one) == "<s><|user|><image>\nLook at  now<|assistant|>"
    two = prompt([Turn("user", "a <image> b <image>")], tokenizer, "tiny", image_lengths=[1, 2])
    assert tokenizer.decode(two) == "<s><|user|>a <image> b <image><image><|assistant|>"


def test_image_count_mismatch_names_both_numbers(tokenizer):
    with pytest.raises(ValueError, match=r"1 <image> mark but there are 2 images"):
        render(
            [Turn("user", QUESTION), Turn("assistant", "A")],
            tokenizer,
            "tiny",
            image_lengths=[1, 1],
        )


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn("user", "a")], "no answer"),
        (
            [Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")],
            "message 1 is from 'user'",
        ),
        ([Turn("system", "s"), Turn("user", "a"), Turn("assistant", "c")], "no place for a system"),
    ],
)
def test_wrong_order_is_refused(tokenizer, turns, message):
    with pytest.raises(ValueError, match=message):
        render(turns, tokenizer, "tiny")


def test_unknown_role_and_missing_text_are_named():
    with pytest.raises(ValueError, match=r"message 0: unknown role 'humn': did you mean 'human'"):
        as_turns([{"from": "humn", "value": "a"}])
    with pytest.raises(ValueError, match="must be a string, got 3"):
        as_turns([{"from": "human", "value": 3}])


def test_unknown_template_names_the_nearest(tokenizer):
    with pytest.raises(ValueError, match="unknown template 'tinny': did you mean 'tiny'"):
        template_of(tokenizer, "tinny")


def test_template_needs_its_control_tokens(tokenizer):
    needs = Template("other", start=(), user=TEMPLATES["tiny"].user, answer=TEMPLATES["v1"].answer)
    assert Renderer(tokenizer, needs).end_token_id == 2
    tokenizer_without = build_tokenizer()
    foreign = Template("foreign", (), (type(needs.user[0])("<|im_start|>"),), needs.answer)
    with pytest.raises(ValueError, match=r"'foreign' needs the control tokens <\|im_start\|>"):
        Renderer(tokenizer_without, foreign)


def test_auto_template_is_saved_with_the_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    fresh = build_tokenizer()
    with pytest.raises(ValueError, match="template 'auto'"):
        template_of(fresh)
    mark_template(fresh, TEMPLATES["tiny"])
    fresh.save_pretrained(tmp_path)
    assert template_of(AutoTokenizer.from_pretrained(tmp_path)).name == "tiny"


@pytest.mark.parametrize("own", [True, False])
def test_chat_template_in_jinja_says_the_same(own):
    tokenizer = build_tokenizer()
    if not own:
        tokenizer.chat_template = TEMPLATES["tiny"].chat_template()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "Who?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = [{**messages[0], "content": "<image>\nWhat?"}, *messages[1:]]
    ids = prompt(plain, tokenizer, "tiny", image_lengths=[1])
    assert text == tokenizer.decode(ids)


def golden_rows() -> list[dict]:
    if not GOLDEN or not TOKENIZERS:
        return []
    rows = []
    for path in sorted(Path(GOLDEN, "templates").glob("*_templates.jsonl")):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    ordinary = [row for row in rows if not any(word in row["case"] for word in NOT_ORDINARY)]
    return [row for row in ordinary if row["template"] in TEMPLATES]


@pytest.fixture(scope="module")
def golden_renderer():
    from transformers import AutoTokenizer

    made: dict[tuple[str, str], Renderer] = {}

    def get(template: str, name: str) -> Renderer:
        if (template, name) not in made:
            tokenizer = AutoTokenizer.from_pretrained(Path(TOKENIZERS or "", name))
            made[template, name] = Renderer(tokenizer, template, image_token_id=-200)
        return made[template, name]

    return get


@pytest.mark.golden
@pytest.mark.skipif(
    not (GOLDEN and TOKENIZERS), reason="PROXYV_GOLDEN and PROXYV_TOKENIZERS are not both set"
)
@pytest.mark.parametrize("row", golden_rows(), ids=lambda row: f"{row['template']}-{row['case']}")
def test_golden_rows(row, golden_renderer):
    renderer = golden_renderer(row["template"], row["tokenizer"])
    human = [m["value"] for m in row["conversations"] if m["from"] == "human"]
    images = sum(text.count("<image>") for text in human)
    rendered = renderer.render(row["conversations"], [1] * images)
    assert rendered.input_ids == row["input_ids"]
    if any(label != IGNORE_INDEX for label in row["labels"]):
        assert rendered.labels == row["labels"]
