"""The tiny preset's vocabulary: one token a character, and a few phrases of questions.

Reading is easiest to learn where a character on the page is a token in the answer. The phrases
that open and close most questions are single tokens, which halves the length of a question, and so
are the answers that stand on no page: a colour, yes or no.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["PHRASES", "SPECIALS", "WORDS", "build_tokenizer", "save_tokenizer"]

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>", "<|assistant|>")

PHRASES = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer the question with a single word.",
    "What is the ",
    "What is ",
    "What was ",
    "What does ",
    "What colour ",
    "What color ",
    "What ",
    "Which ",
    "Who is the ",
    "Who ",
    "How many ",
    "How much is ",
    "How much is the ",
    "Is the value of ",
    "Is ",
    "At what time was it paid?",
    "Read the page.",
    "Describe the picture.",
    " is given?",
    " is shown?",
    " is named?",
    " is listed for ",
    " does ",
    " have?",
    " cost?",
    " of the ",
    " of ",
    " the highest",
    " the lowest",
    " value",
    " greater than ",
    " than ",
    " category ",
    " has ",
    " the ",
    "What is the value of ",
    "What is the value in ",
    "What was the value in ",
    "What value does ",
    "Is the value in ",
    "Which category has ",
    "Which series has ",
    "In which ",
    " the largest",
    " the greatest",
    " the smallest",
    " higher than ",
    " larger than ",
    " lower than ",
    " less than ",
    " smaller than ",
    " in ",
    " for ",
    " and ",
    " series ",
    "How many bars are there?",
    "How many slices are there?",
    "How many categories are shown?",
    "How many groups of bars are there?",
    "How many points does each line have?",
    "What color are the bars?",
    "What color is the line?",
    "What color is ",
    "Which color represents ",
    "What is the title of the chart?",
    "What is the chart about?",
    "What is the name of the horizontal axis?",
    "What is the name of the vertical axis?",
    " is the first from the ",
    "What is the sum of ",
    "What is the difference between ",
    'Bar chart "',
    'Horizontal bar chart "',
    'Grouped bar chart "',
    'Line chart "',
    'Pie chart "',
)

WORDS = (
    "Yes", "No", "black", "blue", "brown", "gray", "green", "orange", "pink", "purple", "red",
    "yellow",
)  # fmt: skip

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the vocabulary: specials, newline, printable ASCII, phrases, words (193 tokens)."""
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIALS])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer.add_tokens([AddedToken(w, normalized=False, single_word=True) for w in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_TEMPLATE,
    )


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer's files and return it."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer
