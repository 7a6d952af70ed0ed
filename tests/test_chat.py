"""The chat command: one question, a conversation, and mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxyv.chat import main, talk
from proxyv.cli import run_command
from proxyv.eval.answerer import Answerer
from tests.small_model import save_small_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "page.png")
    return tmp_path / "page.png"


def command(model: Path, *images: Path) -> list[str]:
    shown = [part for image in images for part in ("--image", str(image))]
    return ["--model", str(model), *shown, "--max-new-tokens", "8", "--device", "cpu"]


def test_one_question_prints_one_answer(
    model_folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(model_folder, picture), "--question", "What is the total?"]) == 0
    shown = capsys.readouterr().out
    answerer = Answerer.load(str(model_folder), device="cpu")
    expected = answerer.generate(
        answerer.prepare(["What is the total?"], [[Image.open(picture)]]), 8
    )[0]
    assert shown == expected + "\n"


def test_several_images(
    model_folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(model_folder, picture, picture), "--question", "Same?"]) == 0
    answerer = Answerer.load(str(model_folder), device="cpu")
    expected = answerer.generate(answerer.prepare(["Same?"], [[Image.open(picture)] * 2]), 8)[0]
    assert capsys.readouterr().out == expected + "\n"


def test_prompt_ends_at_the_end_of_the_input(
    model_folder: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: Iterator[str] = iter(["What?", "  ", "And then?"])

    def read(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert main(command(model_folder, picture)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_conversation_goes_on_and_shows_the_images_once() -> None:
    asked: list[list[dict[str, str]]] = []
    shown: list[str] = []

    def reply(conversation: list[dict[str, str]]) -> str:
        asked.append(list(conversation))
        return f"answer {len(asked)}"

    talk(reply, 2, ["first", "", "second "], shown.append)
    assert shown == ["answer 1", "answer 2"]
    assert asked[1] == [
        {"role": "user", "content": "<image> <image>\nfirst"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "second"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image", "missing.png"], "--image missing.png: no such file"),
        (["--image", "{broken}"], "cannot be decoded"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--model", "runs/nope"], "--model runs/nope: no such folder"),
        (["--question", " "], "--question is empty"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--template", "tinny"], "did you mean 'tiny'"),
    ],
)
def test_mistakes_are_explained_in_one_line(
    model_folder: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    broken = picture.with_name("broken.png")
    broken.write_bytes(picture.read_bytes()[:200])
    changed = [part.format(broken=broken) for part in change]
    arguments = [*command(model_folder, picture), "--question", "What?", *changed]
    assert run_command(main, arguments) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("error: ") and message in shown[-1]
