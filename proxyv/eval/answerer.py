"""A model that answers questions about images: loading, prompts, batches, greedy generation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig

from proxyv import ProxyVConfig, ProxyVForConditionalGeneration, ProxyVProcessor
from proxyv.cli import CommandError, nearest
from proxyv.data.templates import IMAGE_MARK, TEMPLATES, Renderer
from proxyv.eval.decoding import Prompts, answer_ids, can_stop, pad_left
from proxyv.eval.hub import hub_reachable
from proxyv.model.released import is_release
from proxyv.model.stock import read_stock, suggested_template

__all__ = ["ATTENTION", "DTYPES", "Answerer", "check_model_name", "model_type", "user_message"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("sdpa", "eager")
STOCK = "llava_next"
CPU_BATCH_TOKENS = 1024


def user_message(question: str, num_images: int) -> dict[str, str]:
    """A user's message: the images first, then the question.

    A question that holds an ``<image>`` mark says itself where its images are, and gets no more.

    Source: lmms-eval 0.7.3, model ``llava``. Differs: no.
    """
    if num_images and IMAGE_MARK not in question:
        question = " ".join([IMAGE_MARK] * num_images) + f"\n{question}"
    return {"role": "user", "content": question}


class Answerer:
    """A model with its processor and chat template.

    Args:
        model: a `ProxyVForConditionalGeneration`.
        processor: its processor.
        template: name of the chat template; ``auto`` takes the one saved with the tokenizer.
    """

    def __init__(self, model: Any, processor: Any, template: str = "auto") -> None:
        self.model = model.eval()
        self.processor = processor
        self.renderer = Renderer(processor.tokenizer, template, model.config.image_token_index)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str | None = None,
        attention: str = "sdpa",
        device: str | None = None,
        template: str = "auto",
        **fields: Any,
    ) -> Answerer:
        """Load a model folder, or a model of the hub.

        Args:
            name: folder that holds model, processor and tokenizer, or a hub id.
            dtype: a key of `DTYPES`; bfloat16 on a GPU and float32 elsewhere by default.
            attention: a name in `ATTENTION`.
            device: ``cpu``, ``cuda``, ``cuda:1``; the first GPU where there is one by default.
            template: see the class.
            **fields: fields of the model's configuration to set otherwise, such as ``reduction``.

        Raises:
            CommandError: no such folder, an option that does not exist, or weights that do not
                fit the configuration.
        """
        place = _device(device)
        dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
        if dtype not in DTYPES:
            raise CommandError(nearest("dtype", dtype, DTYPES))
        if attention not in ATTENTION:
            raise CommandError(nearest("attention", attention, ATTENTION))
        check_model_name(name)
        kind = model_type(name)
        options = {"dtype": DTYPES[dtype], "attn_implementation": attention}
        if kind == STOCK:
            if fields:
                raise CommandError(
                    f"--model {name}: {', '.join(fields)} cannot be set for a stock LLaVA-NeXT "
                    "model, whose image rows are no crops: use a model of this package"
                )
            model, processor = read_stock(name, **options)
            if template == "auto":
                template = suggested_template(processor) or _no_template(name)
            return cls(model.to(place), processor, template)
        processor = _load_processor(name)  # first, for it is the sooner to fail
        model = _load_weights(name, kind, {**options, **fields})
        processor.follow(model.config)
        return cls(model.to(place), processor, template)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def batch_tokens(self) -> int | None:
        """Input tokens that are worth reading together, None for as many as fit in memory.

        A CPU gains from batches only while few tokens are read: padding needs masks, and what a
        layer writes should stay in the CPU's cache (docs/log.md has the measurement).
        """
        return CPU_BATCH_TOKENS if self.device.type == "cpu" else None

    def describe(self) -> dict[str, Any]:
        """What the answers depend on besides the weights."""
        reduction = getattr(self.model.config, "reduction", None)
        return {
            "template": self.renderer.template.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "device": self.device.type,
            **({} if reduction is None else {"reduction": dict(reduction)}),
        }

    def length(self, question: str, sizes_hw: Sequence[tuple[int, int]]) -> int:
        """Number of input tokens of a question about images of these heights and widths.

        Raises:
            ValueError: the question does not fit the images, or is not Unicode text.
        """
        try:
            question.encode()
        except UnicodeEncodeError as error:  # of which the tokenizer would make a TypeError
            raise ValueError(f"the question is not Unicode text ({error})") from error
        lengths = [self.processor.num_image_tokens(size_hw) for size_hw in sizes_hw]
        return len(self.renderer.prompt([user_message(question, len(sizes_hw))], lengths))

    @property
    def shares(self) -> bool:
        """Whether prompts about the same images can share what they begin with.

        Token reduction may choose image tokens by the question, so with it they do not; nor can
        they where the model asks for a cache of a kind whose rows cannot be repeated.
        """
        ours = isinstance(self.model, ProxyVForConditionalGeneration)
        return ours and self.model.config.reduction is None and can_stop(self.model)

    def shared_length(self, sizes_hw: Sequence[tuple[int, int]]) -> int:
        """Input tokens of such images that prompts about them share; 0 where nothing is shared."""
        return sum(map(self.processor.num_image_tokens, sizes_hw)) if self.shares else 0

    def prepare(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Prompts:
        """The batch of questions, each about its own images (none for text): see `prompts`."""
        conversations = [
            [user_message(question, len(own))]
            for question, own in zip(questions, images, strict=True)
        ]
        return self.prompts(conversations, images)

    def reply(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        images: Sequence[Sequence[Image.Image]],
        max_new_tokens: int,
    ) -> list[str]:
        """Write the next message of each conversation, greedily.

        Args:
            conversations: messages with ``role`` and ``content``; the last one is the user's.
            images: images of each conversation, in the order of their ``<image>`` marks.
            max_new_tokens: longest answer.

        Returns:
            One text for each conversation, without special tokens and outer white space.
        """
        return self.generate(self.prompts(conversations, images), max_new_tokens)

    def generate(self, prompts: Prompts, max_new_tokens: int) -> list[str]:
        """Answer a batch that `prepare` has made, greedily."""
        ids = answer_ids(
            self.model, prompts, max_new_tokens, self._end_token_ids(), self._pad_token_id()
        )
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def prompts(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        images: Sequence[Sequence[Image.Image]],
    ) -> Prompts:
        """The batch of conversations, the next message of each of which is to be written.

        Of those that show the very same picture objects, what they begin with is read once.
        """
        return self._shared(conversations, images) or Prompts(self.inputs(conversations, images))

    def inputs(
        self,
        conversations: Sequence[Iterable[Mapping[str, str]]],
        images: Sequence[Sequence[Image.Image]],
    ) -> dict[str, torch.Tensor]:
        """Build the left-padded batch, on the CPU; text alone brings no pixels."""
        pixels, lengths = self._pixels(images)
        rows = list(map(self.renderer.prompt, conversations, lengths))
        return pad_left(rows, self._pad_token_id()) | pixels

    def _pixels(
        self, images: Sequence[Sequence[Image.Image]]
    ) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """What the model is given of the rows' images, and how many tokens each image takes."""
        flat = [image for own in images for image in own]
        pixels: dict[str, torch.Tensor] = self.processor.image_inputs(flat) if flat else {}
        lengths = iter(self.processor.token_counts(pixels) if flat else [])
        return pixels, [[next(lengths) for _ in own] for own in images]

    def _shared(
        self,
        conversations: Sequence[Iterable[Mapping[str, str]]],
        images: Sequence[Sequence[Image.Image]],
    ) -> Prompts | None:
        """The batch with openings; None where rows have none, or not one for each set of images."""
        sets: dict[tuple[int, ...], int] = {}
        owners = [sets.setdefault(tuple(map(id, own)), len(sets)) for own in images]
        if not self.shares or len(sets) == len(images) or () in sets:
            return None
        pixels, lengths = self._pixels(
            [images[owners.index(number)] for number in range(len(sets))]
        )
        openings: dict[int, list[int]] = {}
        rests = []
        for conversation, owner in zip(conversations, owners, strict=True):
            row = self.renderer.prompt(conversation, lengths[owner])
            cut = len(row) - row[::-1].index(self.model.config.image_token_index)
            if openings.setdefault(owner, row[:cut]) != row[:cut]:
                return None  # text between its images
            if not row[cut:]:
                return None  # nothing is left to read for the question
            rests.append(row[cut:])
        opened = pad_left([openings[number] for number in range(len(sets))], self._pad_token_id())
        rest, order = pad_left(rests, self._pad_token_id()), torch.tensor(owners)
        rows = {name: torch.cat([opened[name][order], rest[name]], dim=1) for name in rest}
        return Prompts(rows, opened | pixels, order)

    def _pad_token_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return self.renderer.end_token_id if pad is None else pad

    def _end_token_ids(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id
        known = configured if isinstance(configured, list) else [configured]
        ends = {self.renderer.end_token_id, *(token for token in known if token is not None)}
        return sorted(ends)


def model_type(name: str) -> str:
    """The type of a model; a release of the authors' counts as one of this package.

    Raises:
        CommandError: its ``config.json`` is invalid, or there is none of that name.
    """
    try:
        if is_release(name):
            return ProxyVConfig.model_type
        return AutoConfig.from_pretrained(name).model_type
    except StrictDataclassError as error:
        raise CommandError(f"--model {name}: invalid config.json ({error})") from error
    except OSError as error:
        raise CommandError(
            f"--model {name}: no such folder, and no model of the hub that could be had ({error})"
        ) from error


def _no_template(name: str) -> NoReturn:
    raise CommandError(
        f"--model {name}: which chat template it wants is not known; name one with --template "
        f"({', '.join(sorted(TEMPLATES))})"
    )


def _load_processor(name: str) -> ProxyVProcessor:
    try:
        return ProxyVProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--model {name}: its processor or tokenizer cannot be loaded; processor_config.json "
            f"(or preprocessor_config.json) and tokenizer.json are needed beside the weights "
            f"({str(error).partition('. ')[0]})"
        ) from error


def _load_weights(name: str, kind: str, options: Mapping[str, Any]) -> Any:
    """Load the model; weights that do not fit the configuration exactly are refused."""
    if kind != ProxyVConfig.model_type:
        raise CommandError(
            f"--model {name}: a model of type {kind!r}, needed is {ProxyVConfig.model_type!r}, "
            f"{STOCK!r} or an authors' release (see python -m proxyv.convert)"
        )
    try:
        model, report = ProxyVForConditionalGeneration.from_pretrained(
            name,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise CommandError(f"--model {name}: damaged weights ({error})") from error
    for what in ("missing_keys", "unexpected_keys"):
        if report[what]:
            raise CommandError(
                f"--model {name}: the weights do not fit config.json, {len(report[what])} "
                f"{what.replace('_', ' ')}, among them {min(map(str, report[what]))}"
            )
    return model


def _device(name: str | None) -> torch.device:
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
    except RuntimeError as error:
        raise CommandError(f"--device {name}: unknown, use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs here, use cpu"
            + (" or cuda" if gpu else "")
        )
    return device


def check_model_name(name: str, option: str = "--model") -> None:
    """Say in one line that a model is not there, before a library tries for half a minute.

    Raises:
        CommandError: neither a folder nor a hub id that could be loaded.
    """
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise CommandError(f"{option} {name}: the folder has no config.json, it is no model")
        return
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CommandError(f"{option} {name}: no such folder")
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not hub_reachable():
        raise CommandError(
            f"{option} {name}: no such folder, and the Hugging Face hub cannot be reached to look "
            "for a model of that name (an earlier download is used with HF_HUB_OFFLINE=1)"
        )
