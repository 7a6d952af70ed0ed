"""Answers of a batch that shares beginnings and sheds rows are those of each prompt alone."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_model import save_small_model
from tiny_models import collate, sample, tiny_model
from torch import Tensor

from proxyv.eval.answerer import Answerer
from proxyv.eval.benchmarks import BENCHMARKS, Sample
from proxyv.eval.decoding import ROUND, Prompts, answer_ids
from proxyv.eval.plan import Item, make_batches
from proxyv.eval.records import read_records
from proxyv.eval.runner import RunOptions, evaluate
from proxyv.eval.sources import Rows

PAD = 0
DOCVQA = BENCHMARKS["docvqa"]


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def counted(model: Any) -> list[tuple[int, int]]:
    """Samples and rows of every pass through the first decoder layer, as they come."""
    passes: list[tuple[int, int]] = []

    def see(layer: Any, args: Any) -> None:
        passes.append(tuple(args[0].shape[:2]))

    model.model.language_model.layers[0].register_forward_pre_hook(see)
    return passes


# ---- rows that are done leave

SHAPES = ([3, "2", 4], [6], [2, "1", 9], [1, "1", 2, "3", 5], [8, "1", 1])
MODELS: dict[str, dict[str, Any]] = {
    "baseline": {"start_layer": None},
    "spatial": {},
    "learned": {"proxy_kind": "learned"},
    "released": {"layout": "released"},
    "skips attention": {"skip": "atn"},
    "fastv": {"start_layer": None, "reduction": {"method": "fastv", "layer": 1, "ratio": 0.5}},
    "pyramiddrop": {
        "start_layer": None,
        "reduction": {"method": "pyramiddrop", "layers": [1, 2], "ratios": [0.5, 0.25]},
    },
    "prumerge": {"start_layer": None, "reduction": {"method": "prumerge", "plus": True}},
}


def plain_answers(model: Any, batch: dict[str, Tensor], most: int, ends: list[int]) -> list[Any]:
    """One prompt after another, through ``generate`` alone."""
    new = model.generate(
        **batch, do_sample=False, max_new_tokens=most, eos_token_id=None, pad_token_id=PAD
    )[:, batch["input_ids"].shape[1] :]
    answers = []
    for row in new.tolist():
        stops = [place for place, token in enumerate(row) if token in ends]
        answers.append(row[: stops[0] + 1] if stops else row)
    return answers


def spreading_ends(endless: list[list[int]]) -> list[int]:
    """Two tokens that end three of five answers in their first half, and one late or never."""
    for pair in itertools.combinations(sorted({token for row in endless for token in row}), 2):
        lengths = sorted(
            next((place for place, token in enumerate(row) if token in pair), len(row))
            for row in endless
        )
        if lengths[2] < 30 and lengths[-1] > 30 + ROUND:
            return list(pair)
    raise AssertionError("no two tokens end these answers at different times")


@pytest.mark.parametrize("name", MODELS)
def test_rows_leave_without_changing_an_answer(name: str, generator: torch.Generator) -> None:
    model = tiny_model(**MODELS[name])
    samples = [sample(list(shape), model.config, generator) for shape in SHAPES]
    alone = [collate([each], side="left") for each in samples]
    endless = [plain_answers(model, each, 60, [])[0] for each in alone]
    ends = spreading_ends(endless)
    expected = [plain_answers(model, each, 60, ends)[0] for each in alone]
    passes = counted(model)
    found = answer_ids(model, Prompts(collate(samples, side="left")), 60, ends, PAD)
    assert found == expected
    sizes = [size for size, rows in passes[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 5 and sizes[-1] <= 2 and len(sizes) == max(map(len, expected)) - 1
    assert all(rows == 1 for _, rows in passes[1:])  # nothing is read twice


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.integers(1, 50),
    st.sampled_from(["baseline", "spatial", "released", "pyramiddrop"]),
)
def test_any_ends_and_limits(places: list[int], most: int, name: str) -> None:
    model, generator = tiny_model(**MODELS[name]), torch.Generator().manual_seed(1)
    samples = [sample(list(shape), model.config, generator) for shape in SHAPES]
    batch = collate(samples, side="left")
    endless = plain_answers(model, batch, 50, [])
    ends = sorted({row[place] for row, place in zip(endless, places, strict=False)})
    expected = plain_answers(model, batch, most, ends)
    assert answer_ids(model, Prompts(batch), most, ends, PAD) == expected


# ---- beginnings that prompts share

FOLDERS: dict[str, dict[str, Any]] = {
    "baseline": {"start_layer": None},
    "spatial": {},
    "learned": {"proxy_kind": "learned"},
    "released": {"layout": "released"},
}
QUESTIONS = ["What?", "What is written at the top of this page?", "No", "How much is it?", "Why?"]


@pytest.mark.parametrize("name", FOLDERS)
def test_shared_beginnings_give_the_answers_of_each_prompt_alone(name: str, tmp_path: Path) -> None:
    """Images of one, two and three crops, so that beginnings are padded too."""
    save_small_model(tmp_path, image_aspect_ratio="anyres", **FOLDERS[name])
    answerer = Answerer.load(str(tmp_path), device="cpu")
    pictures = [random_image(30, 60), random_image(60, 60, 1), random_image(30, 60, 2)]
    images = [[pictures[place]] for place in (0, 1, 0, 2, 0)]
    images[3] = images[1] = [pictures[1], pictures[2]]  # two images, two rows
    alone = [
        answerer.generate(answerer.prepare([question], [own]), 40)[0]
        for question, own in zip(QUESTIONS, images, strict=True)
    ]
    prompts = answerer.prepare(QUESTIONS, images)
    assert prompts.openings is not None and prompts.owners is not None
    assert len(prompts.openings["input_ids"]) == 2 and prompts.owners.tolist() == [0, 1, 0, 1, 0]
    assert len(prompts.openings["pixel_values"]) == 3 and "pixel_values" not in prompts.rows
    passes = counted(answerer.model)
    assert answerer.generate(prompts, 40) == alone
    assert len(set(alone)) > 3
    width = prompts.openings["input_ids"].shape[1]
    rest = prompts.rows["input_ids"].shape[1] - width
    assert passes[:2] == [(2, width), (5, rest)]


def test_what_cannot_be_shared_is_read_whole(tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", image_aspect_ratio="anyres")
    answerer = Answerer.load(str(tmp_path / "model"), device="cpu")
    first, second = random_image(30, 60), random_image(60, 30, 1)

    def shared(questions: list[str], images: list[list[Image.Image]]) -> bool:
        return answerer.prepare(questions, images).openings is not None

    assert shared(["a", "b"], [[first], [first]])
    assert not shared(["a"], [[first]])
    assert not shared(["a", "b"], [[first], [second]])
    assert not shared(["a", "b"], [[first], [first.copy()]])  # equal, but not known to be
    assert not shared(["a", "b", "c"], [[first], [first], []])
    between = ["a <image> or <image>", "b <image> and <image>"]
    assert not shared(between, [[first, second], [first, second]])
    same = ["a <image> or <image>", "a <image> or <image>, say?"]
    assert shared(same, [[first, second], [first, second]])
    assert answerer.shared_length([(30, 60)]) == 3 * 17
    plain = Answerer.load(str(tmp_path / "model"), device="cpu", template="plain")
    prompts = plain.prepare(["a", "b"], [[first], [first]])  # of which the image is all
    assert prompts.openings is None and prompts.rows["input_ids"].shape == (2, 3 * 17)
    answerer.model.generation_config.min_new_tokens = 3
    assert not shared(["a", "b"], [[first], [first]])
    save_small_model(tmp_path / "pruned", start_layer=None)
    options = {"method": "fastv", "layer": 1, "ratio": 0.5}
    answerer = Answerer.load(str(tmp_path / "pruned"), device="cpu", reduction=options)
    assert not shared(["a", "b"], [[first], [first]])
    assert answerer.shared_length([(30, 60)]) == 0


@pytest.mark.parametrize("option", [{"min_new_tokens": 9}, {"cache_implementation": "static"}])
def test_options_that_a_round_would_change_leave_the_batch_whole(
    option: dict[str, Any], generator: torch.Generator
) -> None:
    model = tiny_model()
    samples = [sample(list(shape), model.config, generator) for shape in SHAPES[:3]]
    batch = collate(samples, side="left")
    endless = plain_answers(model, batch, 40, [])
    ends = sorted({endless[0][2], endless[1][3]})
    for name, value in option.items():
        setattr(model.generation_config, name, value)
    expected = model.generate(
        **batch, do_sample=False, max_new_tokens=40, eos_token_id=ends, pad_token_id=PAD
    )[:, batch["input_ids"].shape[1] :].tolist()
    found = answer_ids(model, Prompts(batch), 40, ends, PAD)
    assert [row + [PAD] * (len(expected[0]) - len(row)) for row in found] == expected


def test_a_cache_is_used_whatever_the_model_was_saved_with(generator: torch.Generator) -> None:
    model = tiny_model()
    model.generation_config.use_cache = False
    batch = collate([sample(list(shape), model.config, generator) for shape in SHAPES], side="left")
    endless = plain_answers(model, batch, 40, [])
    passes = counted(model)
    assert answer_ids(model, Prompts(batch), 40, [], PAD) == endless
    assert all(rows == 1 for _, rows in passes[1:])


# ---- through the runner


class Watched(Answerer):
    """Keeps the batches that were answered; has room for so many rows."""

    room = 99
    batches: list[Prompts]

    def generate(self, prompts: Prompts, max_new_tokens: int) -> list[str]:
        if len(prompts) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.batches.append(prompts)
        return super().generate(prompts, max_new_tokens)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("model")
    save_small_model(folder, image_aspect_ratio="anyres")
    answerer = Watched.load(str(folder), device="cpu")
    assert isinstance(answerer, Watched)
    return answerer


def pages() -> Rows:
    """Three questions about each of four pages of several sizes."""
    rows = []
    for index in range(12):
        encoded = io.BytesIO()
        shape = ((30, 60), (60, 30), (60, 60), (30, 30))[index // 3]
        random_image(*shape, seed=index // 3).save(encoded, format="PNG")
        rows.append(
            {
                "questionId": str(index),
                "question": f"{'Which word? ' * (index % 3)}No {index}",
                "image": {"bytes": encoded.getvalue(), "path": None},
                "docId": index // 3,
                "answers": ["a"],
            }
        )
    return Rows(rows, "memory")


@pytest.mark.parametrize("control", [None, "blank-images", "shuffled-images", "question-only"])
def test_a_benchmark_reads_each_page_once_and_scores_the_same(
    watched: Watched, tmp_path: Path, control: str | None
) -> None:
    found = {}
    limit = 700
    for name, size, room in (("alone", 1, 99), ("together", 5, 99), ("cramped", 5, 2)):
        watched.batches, watched.room = [], room
        options = RunOptions(size, control=control, batch_tokens=limit)
        evaluate(DOCVQA, pages(), watched, options, tmp_path / name, lambda _: None)
        answers = [record["answer"] for record in read_records(tmp_path / name / "docvqa.jsonl")]
        found[name] = answers
        shared = [batch for batch in watched.batches if batch.openings is not None]
        assert bool(shared) == (size > 1 and control != "question-only")
        for batch in shared:
            assert batch.openings is not None
            width = batch.openings["input_ids"].shape[1]
            rest = batch.rows["input_ids"][:, width:].numel()
            assert batch.openings["input_ids"].numel() + rest <= limit
    assert found["together"] == found["alone"] == found["cramped"]
    assert len(set(found["alone"])) > 4


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.integers(40, 400),
)
def test_batches_count_what_is_shared_once(
    drawn: list[tuple[int, int]], batch_size: int, most: int
) -> None:
    blank = Sample("0", "q", "p", ())
    items = [
        Item(i, blank, i, (), False, 20 * (1 + image) + own, f"hash {image}", 20 * (1 + image))
        for i, (image, own) in enumerate(drawn)
    ]
    batches = make_batches(items, batch_size, most)
    assert batches == make_batches(items[::-1], batch_size, most)
    flat = [item for batch in batches for item in batch]
    assert sorted(item.index for item in flat) == list(range(len(items)))
    shown = [item.image_hash for item in flat]
    assert all(shown[p] == shown[p - 1] or shown[p] not in shown[:p] for p in range(1, len(shown)))

    def read(batch: list[Item]) -> int:
        """Tokens of the padded tensors that the model would be given."""
        images = {item.image_hash for item in batch}
        if len(images) == len(batch):
            return len(batch) * max(item.length for item in batch)
        openings = len(images) * max(item.shared for item in batch)
        return openings + len(batch) * max(item.length - item.shared for item in batch)

    for place, batch in enumerate(batches):
        assert len(batch) <= batch_size and (len(batch) == 1 or read(batch) <= most)
        if place + 1 < len(batches) and len(batch) < batch_size:
            assert read([*batch, batches[place + 1][0]]) > most
