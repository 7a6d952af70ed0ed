"""The runner under load: reading ahead, too little memory, several processes, kills."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyv.eval.__main__ import main
from proxyv.eval.asking import read_ahead
from proxyv.eval.benchmarks import BENCHMARKS, Sample
from proxyv.eval.plan import Item, make_batches
from proxyv.eval.records import append_records, read_records
from proxyv.eval.runner import RunOptions, evaluate
from proxyv.eval.sources import Rows
from proxyv.eval.team import Team
from tests.evaluation_kills import disturb
from tests.small_model import save_small_model
from tests.test_eval import Reader, document_rows, png, run, save_parquet

DOCVQA = BENCHMARKS["docvqa"]


# ---- reading ahead


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(), max_size=20), st.integers(1, 4))
def test_results_come_in_the_order_of_the_jobs(jobs: list[int], workers: int) -> None:
    assert list(read_ahead(lambda job: job * 2, jobs, workers)) == [job * 2 for job in jobs]


def test_no_more_is_read_ahead_than_asked_for() -> None:
    begun: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(20):
            begun.append(number)
            yield number

    results = read_ahead(lambda job: job, jobs(), 3)
    assert next(results) == 0 and len(begun) == 4
    assert next(results) == 1 and len(begun) == 5
    results.close()


def test_the_next_batch_is_read_while_one_is_answered() -> None:
    """The second job ends although the first result is still being worked on."""
    second = threading.Event()

    def job(number: int) -> int:
        if number == 1:
            second.set()
        return number

    for number in read_ahead(job, [0, 1], 2):
        if number == 0:
            assert second.wait(timeout=60)


def test_an_error_in_a_thread_reaches_the_runner() -> None:
    def job(number: int) -> int:
        if number == 2:
            raise ZeroDivisionError
        return number

    results = read_ahead(job, range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


# ---- batches


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 6), st.integers(1, 150))
def test_batches_hold_no_more_tokens_than_allowed(
    lengths: list[int], batch_size: int, most: int
) -> None:
    sample = Sample("0", "q", "p", ())
    items = [Item(i, sample, None, (), False, length) for i, length in enumerate(lengths)]
    batches = make_batches(items, batch_size, most)
    flat = [item for batch in batches for item in batch]
    assert sorted(item.index for item in flat) == list(range(len(lengths)))
    assert [item.length for item in flat] == sorted(lengths, reverse=True)
    for place, batch in enumerate(batches):
        assert len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * batch[0].length <= most
        if place + 1 < len(batches) and len(batch) < batch_size:  # one more is too much
            assert (len(batch) + 1) * batch[0].length > most


# ---- memory


class Cramped(Reader):
    """A model on a device with room for a few questions at a time."""

    def __init__(self, room: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.room, self.error, self.tries = room, error, 0

    def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
        self.tries += 1
        if len(prepared[0]) > self.room:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().generate(prepared, max_new_tokens)


def test_out_of_memory_halves_the_batches(tmp_path: Path) -> None:
    expected, _ = run(document_rows(21), tmp_path / "roomy", batch_size=8)
    reader = Cramped(3)
    result, lines = run(document_rows(21), tmp_path / "cramped", reader=reader, batch_size=8)
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert [len(batch) for batch in reader.batches] == [2] * 10 + [1]
    assert reader.tries == 11 + 2  # 8 and 4 are tried once and never again
    assert lines == [
        "docvqa: out of memory, going on with 4 questions at a time",
        "docvqa: out of memory, going on with 2 questions at a time",
    ]


def test_a_resumed_run_cuts_its_batches_as_the_first_did(tmp_path: Path) -> None:
    rows = document_rows(24)
    whole = Cramped(4)
    run(rows, tmp_path / "whole", reader=whole, batch_size=8)
    first = Cramped(4)
    first.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "parts", reader=first, batch_size=8)
    second = Cramped(9)  # more room now, and still the same pieces
    run(rows, tmp_path / "parts", reader=second, batch_size=8)
    assert second.batches == whole.batches[2:]  # the third piece was lost with its batch


class Uneven(Cramped):
    """A device with room for five questions, or two where one is about a certain page."""

    def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
        pages = [np.asarray(own[0])[0, 0, 0] for own in prepared[1]]
        self.room = 2 if 13 in pages else 5
        return super().generate(prepared, max_new_tokens)


@pytest.mark.parametrize("device", [lambda: Cramped(3), lambda: Uneven(5)])
def test_pieces_of_an_odd_batch_are_the_same_in_a_resumed_run(
    tmp_path: Path, device: Callable[[], Cramped]
) -> None:
    """Ten become five and then two; what was answered of the batch before that does not matter."""
    rows = document_rows(20)
    whole, first, second = device(), device(), device()
    run(rows, tmp_path / "whole", reader=whole, batch_size=10)
    kept = whole.batches[-10:]  # before them, pieces of a batch that was cut again
    assert [len(batch) for batch in kept] == [2] * 10
    first.stop_after = len(whole.batches) - 6  # in the first batch, when its size was found
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path / "parts", reader=first, batch_size=10)
    run(rows, tmp_path / "parts", reader=second, batch_size=10)
    assert second.batches == kept


def test_a_question_too_large_for_the_device_fails_alone(tmp_path: Path) -> None:
    class Large(Cramped):
        def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
            self.room = 0 if any(own[0].width > 100 for own in prepared[1]) else 99
            return super().generate(prepared, max_new_tokens)

    rows = document_rows(6)
    rows[2]["image"]["bytes"] = png(11, (20, 200))
    result, _ = run(rows, tmp_path, reader=Large(1), batch_size=3)
    assert (result["failed"], result["scores"]["anls"]["value"]) == (1, pytest.approx(5 / 6))
    assert "1002: " in result["errors"][0] and "do not fit in memory" in result["errors"][0]


def test_other_errors_of_the_model_are_not_hidden(tmp_path: Path) -> None:
    class Broken(Reader):
        def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(document_rows(4), tmp_path, reader=Broken())


def test_a_sample_that_cannot_be_prepared_fails_alone(tmp_path: Path) -> None:
    class Picky(Reader):
        def prepare(self, questions: Any, images: Any) -> Any:
            if any(image.width > 10 * image.height for own in images for image in own):
                raise ValueError("the image is too narrow")
            return super().prepare(questions, images)

    rows = document_rows(7)
    rows[3]["image"]["bytes"] = png(11, (5, 90))
    reader = Picky()
    result, _ = run(rows, tmp_path, reader=reader, batch_size=4)
    assert result["errors"] == ["1003: the image is too narrow"]
    assert sum(map(len, reader.batches)) == 6


# ---- several processes


def test_the_shares_of_two_processes_make_the_whole(tmp_path: Path) -> None:
    rows = document_rows(23)
    rows[5]["answers"] = []
    expected, _ = run(rows, tmp_path / "alone", batch_size=3)
    table, both = Rows(rows, "memory"), tmp_path / "both"
    meeting = threading.Barrier(2)
    readers, results = [Reader(), Reader()], [{}, {}]

    def work(rank: int) -> None:
        team = Team(rank, 2, rank, lambda: meeting.wait(60) and None)
        results[rank] = evaluate(
            DOCVQA, table, readers[rank], RunOptions(3), both, lambda _: None, team
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert (both / "docvqa.jsonl").read_bytes() == (tmp_path / "alone/docvqa.jsonl").read_bytes()
    assert [len(reader.batches) for reader in readers] == [4, 4]
    assert not list(both.glob("*.rank*"))


def test_what_a_killed_team_has_written_is_taken_up_by_one(tmp_path: Path) -> None:
    rows = document_rows(12)
    expected, _ = run(rows, tmp_path / "whole", batch_size=3)
    records = read_records(tmp_path / "whole/docvqa.jsonl")
    (tmp_path / "parts").mkdir()
    append_records(tmp_path / "parts/docvqa.rank0.jsonl", records[:4])
    append_records(tmp_path / "parts/docvqa.rank3.jsonl", records[6:8])
    reader = Reader()
    result, lines = run(rows, tmp_path / "parts", reader=reader, batch_size=3)
    assert "resuming, 6 of 12" in lines[0]
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["docvqa.jsonl"]


# ---- with a model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), image_aspect_ratio="anyres")


def write_documents(folder: Path, count: int) -> Path:
    rows = [
        {**row, "questionId": str(index), "docId": index}
        for index, row in enumerate(document_rows(20) * (count // 20 + 1))
    ][:count]
    for index, row in enumerate(rows):
        shape = ((20, 60), (60, 20), (70, 70))[index % 3]
        row["image"] = {"bytes": png(index % 200, shape), "path": None}
    save_parquet(folder / "docvqa/validation.parquet", rows)
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_gloo_processes_write_the_same_files(model_folder: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data", 14)
    command = ["--model", str(model_folder), "--data", str(data), "--tasks", "docvqa"]
    command += ["--batch-size", "3", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(free_port()), "-m", "proxyv.eval", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "--output", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("anls") == 1  # one table, not two
    one, two = ((tmp_path / name / "docvqa.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    results = [
        json.loads((tmp_path / name / "results.json").read_text("utf-8")) for name in ("one", "two")
    ]
    assert results[0]["tasks"]["docvqa"]["scores"] == results[1]["tasks"]["docvqa"]["scores"]
    assert results[0]["settings"] == results[1]["settings"]
    assert [result["hardware"]["processes"] for result in results] == [1, 2]


def test_bfloat16(model_folder: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data", 5)
    command = ["--model", str(model_folder), "--data", str(data), "--tasks", "docvqa"]
    command += ["--dtype", "bfloat16", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert results["settings"]["dtype"] == "bfloat16" and results["tasks"]["docvqa"]["failed"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_samples_killed_three_times(model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL at three places; the scores and every answer are those of an undisturbed run."""
    data = write_documents(tmp_path / "data", 2000)
    command = ["--model", str(model_folder), "--data", str(data), "--tasks", "docvqa"]
    assert disturb([*command, "--device", "cpu"], tmp_path, kills=3) == []
