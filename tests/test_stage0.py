"""Stage 0: what is in each patch, the vocabulary, the loop that can be stopped and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from proxyv.data.templates import IGNORE_INDEX
from proxyv.model.modeling import ProxyVForConditionalGeneration
from proxyv.model.stage1 import load_projector, save_stage1
from proxyv.synthetic.page import Glyph
from proxyv.synthetic.world import CHART_PROMPT, DOCUMENT_PROMPT, READ_PROMPT, Mix
from proxyv.train.stage0.language import (
    CURRICULUM,
    GridReader,
    LanguageSettings,
    answer_weights,
    scaled,
)
from proxyv.train.stage0.loop import (
    Optimisers,
    Trainee,
    learning_rate,
    load_bf16,
    run_loop,
    save_bf16,
)
from proxyv.train.stage0.page_table import PageTable
from proxyv.train.stage0.pages import PageRing, warped
from proxyv.train.stage0.pair import PairSettings, ReadingPair, train_pair
from proxyv.train.stage0.projector import (
    PageProjector,
    Projector,
    ProjectorSettings,
    train_projector,
)
from proxyv.train.stage0.targets import (
    ALPHABET,
    BLANK,
    SLOTS,
    colour_cells,
    glyph_array,
    patch_targets,
)
from proxyv.train.stage0.tokenizer import PHRASES, SPECIALS, build_tokenizer
from proxyv.train.stage0.tower import ReadingTower, TowerSettings, normalise


def read(slots: np.ndarray) -> str:
    return "".join(ALPHABET[index - 1] for index in slots if index != BLANK)


def test_patches_read_lines_left_to_right() -> None:
    glyphs = [
        Glyph("c", 3, 10), Glyph("d", 9, 10.5), Glyph("b", 9, 2), Glyph("a", 3, 2.5),
        Glyph("x", 15, 3), Glyph("é", 16, 3), Glyph("out", 40, 3), Glyph("z", -1, 3),
    ]  # fmt: skip
    slots = patch_targets(glyph_array(glyphs), (1, 2), 14)
    assert [read(row) for row in slots] == ["abcd", "x"]


@given(
    st.lists(
        st.tuples(st.sampled_from(ALPHABET), st.floats(0, 27.9), st.floats(0, 41.9)), max_size=25
    )
)
@settings(max_examples=60, deadline=None)
def test_every_glyph_is_in_its_patch(glyphs: list[tuple[str, float, float]]) -> None:
    slots = patch_targets(glyph_array([Glyph(*glyph) for glyph in glyphs]), (3, 2), 14)
    for patch in range(6):
        inside = [c for c, x, y in glyphs if int(y // 14) * 2 + int(x // 14) == patch]
        found = sorted(read(slots[patch]))
        assert len(found) == min(len(inside), SLOTS)
        if len(inside) <= SLOTS:
            assert found == sorted(inside)


def test_colour_cells() -> None:
    image = torch.zeros(1, 3, 28, 14)
    image[:, 0, 14:] = 1.0  # the lower patch is red
    cells = colour_cells(image, 14)
    assert cells.shape == (1, 2, 48)
    assert torch.equal(cells[0, 0], -torch.ones(48))
    assert torch.equal(cells[0, 1], torch.tensor([1.0] * 16 + [-1.0] * 32))


def test_shift_moves_picture_and_glyphs_together() -> None:
    image = np.full((30, 40, 3), 255, dtype=np.uint8)
    image[12, 20] = 0
    glyphs = glyph_array([Glyph("a", 20, 12)])
    places = set()
    for seed in range(10):
        moved, where = warped(image, glyphs, np.random.default_rng(seed), 5)
        y, x = np.argwhere(moved[..., 0] == 0)[0]
        assert (where[0, 1], where[0, 2]) == (x, y)
        places.add((int(x), int(y)))
    assert len(places) > 4


@given(st.integers(0, 10_000), st.integers(20, 60), st.integers(20, 60))
@settings(max_examples=30, deadline=None)
def test_stretch_moves_picture_and_glyphs_together(seed: int, x: int, y: int) -> None:
    image = np.full((80, 80, 3), 255, dtype=np.uint8)
    image[y - 1 : y + 2, x - 1 : x + 2] = 0
    glyphs = glyph_array([Glyph("a", x + 0.5, y + 0.5)])
    bent, where = warped(image, glyphs, np.random.default_rng(seed), 4, stretch=0.15)
    assert bent.shape == image.shape
    dark = 255.0 - bent[..., 0]
    rows, columns = np.mgrid[:80, :80] + 0.5  # pixel (0, 0) reaches from 0 to 1
    found = np.array([(dark * columns).sum(), (dark * rows).sum()]) / dark.sum()
    assert np.abs(found - where[0, 1:]).max() < 0.35
    assert where[0, 0] == glyphs[0, 0]


def test_vocabulary() -> None:
    tokenizer = build_tokenizer()
    for prompt in (DOCUMENT_PROMPT, CHART_PROMPT, READ_PROMPT):
        assert prompt in PHRASES and len(tokenizer.encode(prompt, add_special_tokens=False)) == 1
    text = "What is the total of A&B?\n#42 {x} ~"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.encode("é", add_special_tokens=False) == [tokenizer.unk_token_id]
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIALS] == list(range(7))


def test_chat_template_equals_training_template() -> None:
    reader_tokens = build_tokenizer()
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A"},
    ]
    text = reader_tokens.apply_chat_template(talk, tokenize=False)
    assert text == "<s><|user|><image>\nWhat is it?<|assistant|>A</s>"


def test_learning_rate() -> None:
    rates = [learning_rate(step, 1000, 100, 0.3) for step in range(1001)]
    assert rates[0] == 0.01 and rates[99] == 1.0
    assert all(rate == 1.0 for rate in rates[99:700])
    assert rates[850] == pytest.approx(0.5) and rates[1000] == 0.0


class Line(Trainee):
    """Fits y = 3x + 1, with an own data order for each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(1, 8), nn.Linear(8, 1)])

    def loss(self, step: int):
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(step))
        guess = self.layers[1](torch.tanh(self.layers[0](x)))
        return (guess - 3 * x - 1).square().mean(), {"size": 16.0}

    def measure(self) -> dict[str, float]:
        return {"weight": float(self.layers[0].weight.sum())}


def fit(folder: Path, stops: list[int], total: int = 60) -> dict[str, torch.Tensor]:
    for steps in [*stops, total]:
        line = Line()
        run_loop(
            line, Optimisers(line, 1e-2, 1e-2), folder, steps=steps, warmup=5, cooldown=0.0,
            measure_every=20, save_every=10, report=lambda _: None,
        )  # fmt: skip
    return line.state_dict()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, parts = fit(tmp_path / "whole", []), fit(tmp_path / "parts", [17, 40])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60 and "weight" in rows[-1]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    reading = ReadingTower(TowerSettings(tmp_path, tmp_path / "out", held=0))
    with torch.no_grad():
        next(reading.tower.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        save_bf16(reading, "tower", tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("backbone", ["tower", "language"])
def test_a_saved_backbone_can_be_trained_on(tmp_path: Path, backbone: str) -> None:
    def fresh(seed: int) -> Trainee:
        given = {"seed": seed, "held": 0}
        if backbone == "tower":
            return ReadingTower(TowerSettings(tmp_path, tmp_path, **given))
        return GridReader(LanguageSettings(tmp_path, tmp_path, **given))

    saved, other = fresh(1), fresh(2)
    save_bf16(saved, backbone, tmp_path / "out")
    load_bf16(other, backbone, tmp_path / "out")
    for name, value in saved.state_dict().items():
        assert torch.equal(value.bfloat16().float(), other.state_dict()[name]), name
    (tmp_path / "out/head.safetensors").unlink()
    save_file({"strange": torch.zeros(1)}, tmp_path / "out/head.safetensors")
    with pytest.raises(ValueError, match=r"unexpected \['strange'\]"):
        load_bf16(other, backbone, tmp_path / "out")


def test_several_workers_draw_what_one_would() -> None:
    """The pages of a seed, each once; none is drawn twice and none is left out."""
    mix, size = Mix(0, 1, 0), (168, 168)
    alone, helped = PageRing(5, 7, mix, size), PageRing(5, 7, mix, size, workers=2)
    for ring in (alone, helped):
        ring.fill()
    assert [page.caption for page in alone.pages] == [page.caption for page in helped.pages]
    before = set(page.caption for page in helped.pages)
    while helped.drawn < 19 or set(page.caption for page in helped.pages) & before:
        helped.renew(2)
    assert len(helped.pages) == 7


def test_another_batch_keeps_the_proportions_of_the_phases() -> None:
    sizes = [phase.batch for phase in scaled(CURRICULUM, 4 * CURRICULUM[-1].batch)]
    assert sizes == [4 * phase.batch for phase in CURRICULUM]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tower_and_language_model_take_a_step(tmp_path: Path, device: str) -> None:
    small = {"ring": 4, "renew": 1, "workers": 0, "batch": 2, "held": 2, "device": device}
    tower = ReadingTower(TowerSettings(tmp_path / "t", tmp_path / "to", **small))
    loss, numbers = tower.loss(0)
    loss.backward()
    assert torch.isfinite(loss) and 0 <= numbers["right"] <= 1
    assert all(p.grad is not None for n, p in tower.named_parameters() if "post_layer" not in n)
    assert set(tower.measure()) == {
        "documents_train", "documents_test", "charts_train", "charts_test",
    }  # fmt: skip
    del small["batch"]
    phases = tuple(replace(phase, steps=1, batch=2) for phase in CURRICULUM)
    reader = GridReader(LanguageSettings(tmp_path / "l", tmp_path / "lo", phases=phases, **small))
    assert [reader._phase(step) for step in range(6)] == [0, 1, 2, 3, 3, 3]
    for step in range(4):  # strips, word grids, small charts, pages
        loss, _ = reader.loss(step)
        loss.backward()
        assert torch.isfinite(loss)
    assert set(reader.measure()) >= {"documents_answers", "charts_characters"}


def test_language_model_is_supervised_on_answers_only(tmp_path: Path) -> None:
    reader = GridReader(LanguageSettings(tmp_path, tmp_path, ring=2, workers=0, held=0))
    ids, labels = reader._pad([reader._tokens([("What is it?", "A"), ("And now?", "BC")], 144)])
    said = labels[0] != IGNORE_INDEX
    assert reader.tokenizer.decode(labels[0][said]) == "A</s>BC</s>"
    assert torch.equal(ids[0, 1:][said[:-1]], labels[0, :-1][said[:-1]])
    assert int((ids == reader.renderer.image_token_id).sum()) == 145


def test_ring_replaces_the_oldest() -> None:
    ring = PageRing(3, 4, Mix(documents=1, charts=0), (168, 168))
    ring.fill()
    first = [page.caption for page in ring.pages]
    ring.renew(2)
    assert [page.caption for page in ring.pages][2:] == first[2:]
    assert [page.caption for page in ring.pages][:2] != first[:2]


def test_the_tower_learns_the_embedding_of_the_language_model(tmp_path: Path) -> None:
    small = {"steps": 1, "ring": 2, "workers": 0, "held": 0}
    reader = GridReader(LanguageSettings(tmp_path, tmp_path, **small))
    save_bf16(reader, "language", tmp_path)
    tower = ReadingTower(TowerSettings(tmp_path, tmp_path, language=tmp_path, held=0, workers=0))
    images = torch.rand(1, 3, 168, 168)
    slots = torch.randint(0, 90, (1, 144, SLOTS))
    expected = reader.embed_page(slots, images)[:, :-1]
    torch.testing.assert_close(tower.target[0](slots, images), expected, atol=2e-2, rtol=2e-2)
    assert not any(name.startswith("target") for name in tower.state_dict())
    save_file({"read.weight": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"holds no page table.*stage0 language"):
        PageTable.of_language(tmp_path, (12, 12), 14)


def test_the_projector_learns_the_embedding_and_starts_a_model(tmp_path: Path) -> None:
    """The file that is written makes a model's rows of an image those of the page table."""
    small = {"ring": 8, "workers": 0}
    reader = GridReader(LanguageSettings(tmp_path, tmp_path, held=0, **small))
    save_bf16(reader, "language", tmp_path / "language")
    tower = ReadingTower(
        TowerSettings(tmp_path, tmp_path, language=tmp_path / "language", held=0, **small)
    )
    save_bf16(tower, "tower", tmp_path / "vision")
    settings = ProjectorSettings(
        tmp_path / "run", tmp_path / "projector.safetensors", steps=12, batch=4, renew=1, held=2,
        language=tmp_path / "language", vision=tmp_path / "vision", **small,
    )  # fmt: skip
    with torch.no_grad():
        fresh = PageProjector(settings).measure()
    train_projector(settings)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(0 < rows[-1][kind] < fresh[kind] for kind in ("documents", "charts"))

    fitted = PageProjector(settings)
    fitted.load_state_dict(torch.load(tmp_path / "run/state.pt", weights_only=True)["trainee"])
    image = torch.rand(1, 3, 168, 168)
    with torch.no_grad():
        expected = fitted.projector(tower.features(image))[0]
    for start_layer in (None, 3):
        model = ProxyVForConditionalGeneration.from_backbones(
            tmp_path / "vision",
            tmp_path / "language",
            config_overrides={
                "start_layer": start_layer, "image_token_index": 4, "vision_feature_layer": -1,
            },
        )  # fmt: skip
        load_projector(model, settings.out)
        with torch.no_grad():
            found = model.model.multi_modal_projector(tower.features(image))[0]
        torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)
        newline = model.model.image_newline.float()
        torch.testing.assert_close(newline, reader.table.newline, atol=1e-2, rtol=1e-2)
    save_stage1(model, tmp_path / "proxyv.safetensors")
    with pytest.raises(ValueError, match=r"trained with start_layer=3.*start_layer=None"):
        load_projector(model, tmp_path / "proxyv.safetensors")


def test_the_pair_learns_together_and_its_parts_fit_each_other(tmp_path: Path) -> None:
    """A model of the three parts that are written answers as the pair did."""
    small = {"ring": 4, "renew": 1, "workers": 0}
    reader = GridReader(LanguageSettings(tmp_path, tmp_path, held=0, **small))
    save_bf16(reader, "language", tmp_path / "language")
    tower = ReadingTower(
        TowerSettings(tmp_path, tmp_path, language=tmp_path / "language", held=0, **small)
    )
    save_bf16(tower, "tower", tmp_path / "vision")
    Projector(192, 256).save(tmp_path / "projector.safetensors", reader.table.newline)
    settings = PairSettings(
        tmp_path / "run", tmp_path / "out", steps=2, batch=2, held=1, init=tmp_path, **small
    )
    begun = ReadingPair(settings)
    loss, _ = begun.loss(0)
    loss.backward()
    for part in (begun.reader.language, begun.vision.tower, begun.projector):
        grads = [p.grad for n, p in part.named_parameters() if "post_layer" not in n]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    before = {name: value.clone() for name, value in begun.state_dict().items()}

    train_pair(settings)
    trained = ReadingPair(replace(settings, init=settings.out))
    after = trained.state_dict()
    fixed = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("reader.table.")} <= fixed
    for name in ("layers.0.self_attn.q_proj", "layers.5.mlp.fc1", "projector.linear_1"):
        assert not {n for n in before if name in n and n.endswith("weight")} & fixed

    model = ProxyVForConditionalGeneration.from_backbones(
        settings.out / "vision",
        settings.out / "language",
        config_overrides={
            "start_layer": None, "image_token_index": 4, "vision_feature_layer": -1,
        },
    )  # fmt: skip
    load_projector(model, settings.out / "projector.safetensors")
    image = torch.rand(1, 3, 168, 168)
    with torch.no_grad():
        seen = trained.page(trained.vision.features(image))
        found = model.model.multi_modal_projector(
            model.model.vision_tower(normalise(image)).last_hidden_state[:, 1:]
        )
    torch.testing.assert_close(found.float(), seen[:, :-1], atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(model.model.image_newline.float(), seen[0, -1], atol=1e-2, rtol=1e-2)


def test_an_answer_weighs_as_the_root_of_its_length() -> None:
    labels = torch.tensor(
        [[IGNORE_INDEX, 5, 5, 5, 5, IGNORE_INDEX, 7], [1, 1] + [IGNORE_INDEX] * 5]
    )
    expected = torch.tensor([[0, 0.5, 0.5, 0.5, 0.5, 0, 1.0], [2**-0.5, 2**-0.5, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(answer_weights(labels), expected)
