"""Parquet read where it lies: rows, the order in which processes read it, and training on it."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_training import make_backbones, make_rows, overrides
from test_mixture import PIPELINE, record, write_json
from test_resume import At

from proxyv.data.dataset import ConversationDataset, check_rows
from proxyv.data.images import DataError, ImageFolder
from proxyv.data.mixture import MixtureSource
from proxyv.data.readers import JsonSource
from proxyv.data.sampler import LaneSampler
from proxyv.data.sources import open_source
from proxyv.data.stream import ParquetStream
from proxyv.data.templates import Renderer
from proxyv.train import run
from proxyv.train.checkpoints import find_checkpoints
from proxyv.train.config_files import load_settings
from proxyv.train.signals import Interrupted
from proxyv.train.stage0.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Backbones, 12 rows as JSON with images, and the same in 3 files of row groups of 2."""
    folder = tmp_path_factory.mktemp("world")
    make_backbones(folder)
    rows = json.loads(make_rows(folder, 8, text_only=4).read_text())
    (folder / "parquet").mkdir()
    for number in range(3):
        part = [
            {**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}}
            if "image" in row
            else {**row, "image": None}
            for row in rows[number::3]
        ]
        table = datasets.Dataset.from_list(part)
        table.to_parquet(folder / "parquet" / f"{number}.parquet", batch_size=2)
    return folder


def said(row) -> tuple:
    return row.turns, [reference.load().tobytes() for reference in row.images]


def test_rows_are_those_that_a_copy_would_have(world, tmp_path, monkeypatch):
    path = str(world / "parquet")
    streamed = open_source(path, None, streaming=True)
    assert isinstance(streamed, ParquetStream)
    copied = open_source(path, None)
    assert len(streamed) == len(copied) == 12
    assert [said(row) for row in streamed] == [said(row) for row in copied]
    assert streamed.blocks.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert copied.blocks is None
    assert streamed[3].where.startswith(f"{path} (streamed): row 3 (id ")
    again = pickle.loads(pickle.dumps(streamed))
    assert said(again[7]) == said(streamed[7]) and again.fingerprint == streamed.fingerprint
    with pytest.raises(IndexError, match="row 12 of 12"):
        streamed[12]


def test_no_more_is_held_than_a_window(world, monkeypatch):
    monkeypatch.setattr("proxyv.data.stream.WINDOW_ROWS", 2)
    streamed = open_source(str(world / "parquet"), None, streaming=True)
    for index in (0, 3, 11, 5, 4):
        streamed[index]
        assert sum(len(table) for table in streamed._held.values()) <= 6
    assert list(streamed._held) == [1, 5, 2]


def test_a_file_that_is_not_complete_is_named(world, tmp_path):
    whole = (world / "parquet" / "0.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"cut\.parquet: not a complete parquet file"):
        open_source(str(tmp_path / "cut.parquet"), None, streaming=True)


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@given(sizes, st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_an_order_has_every_row_once_and_changes_with_the_pass(sizes, micro, lanes, seed):
    blocks = np.repeat(np.arange(len(sizes)), sizes)
    sampler = LaneSampler(blocks, micro, lanes, seed)
    order = sampler.order(0)
    assert sorted(order.tolist()) == list(range(len(blocks)))
    assert np.array_equal(order, LaneSampler(blocks, micro, lanes, seed).order(0))
    if len(blocks) > 20:
        assert not np.array_equal(order, sampler.order(1))


def test_a_process_reads_its_own_blocks_one_window_after_another(monkeypatch):
    monkeypatch.setattr("proxyv.data.sampler.WINDOW_ROWS", 16)
    ranks, workers, micro = 2, 3, 4
    blocks = np.repeat(np.arange(60), 8)
    order = LaneSampler(blocks, micro, ranks * workers, 0).order(0)
    batches = blocks[order].reshape(-1, micro)
    read: dict[tuple[int, int], list[int]] = {}
    for number, batch in enumerate(batches):  # as accelerate and the data loader deal them
        process = number % ranks, number // ranks % workers
        read.setdefault(process, []).extend(batch.tolist())
    assert len(read) == 6
    for one in read.values():
        for start in range(0, len(one), 16):
            assert len(set(one[start : start + 16])) == 2  # two blocks make a window
    assert sum(len(set(one)) for one in read.values()) == 60  # no block is read twice
    first = blocks[order[: micro * 6]]
    assert len(set(first.tolist())) > 6  # a step mixes them all


def test_a_mixture_of_streams_and_files(world, tmp_path):
    names = write_json(tmp_path / "r.jsonl", [record(str(i)) for i in range(3)])
    parts = [
        open_source(str(world / "parquet"), None, streaming=True),
        JsonSource(Path(names), ImageFolder(None)),
    ]
    mixed = MixtureSource(parts, [None, None], [0.5, 2.0])
    blocks = mixed.blocks
    assert len(blocks) == len(mixed) == 6 + 6
    assert set(blocks[6:].tolist()) == {6} and blocks[:6].max() < 6
    assert MixtureSource(parts[1:], [None], [1.0]).blocks is None
    listed = tmp_path / "mixture.yaml"
    listed.write_text(f"- annotations: {world / 'parquet'}\n  weight: 2\n")
    opened = open_source(str(listed), None, streaming=True)
    assert opened.blocks.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] * 2


@pytest.mark.parametrize(("number", "groups"), [(2, {0}), (5, {0, 2, 4}), (12, set(range(6)))])
def test_a_look_beforehand_reads_few_row_groups(world, number, groups):
    source = open_source(str(world / "parquet"), None, streaming=True)
    data = ConversationDataset(source, Renderer(build_tokenizer(), "tiny"), PIPELINE, 128)
    assert check_rows(data, number, 0.0).checked == number
    assert set(source._held) == groups


def settings_for(world: Path, folder: Path, **more: object):
    values = {
        "data.annotations": world / "parquet",
        "data.images": "null",
        "data.streaming": True,
        "run.output_dir": folder,
        "optim.max_steps": 5,  # a pass has three
        "model.dtype": "float32",
        "deepspeed.config": "null",
        **more,
    }
    return load_settings(ROOT / "configs/tiny/pretrain.yaml", overrides(world, **values))


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def stopped(settings) -> None:
    """A run that is told to go in its fourth step, which is in its second pass."""
    run.Progress = lambda: At(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run.train(settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_in_the_same_order(world, tmp_path, monkeypatch, workers):
    monkeypatch.chdir(ROOT)
    more = {"data.workers": workers, "run.save_steps": 0}
    whole = run.train(settings_for(world, tmp_path / "whole", **more))
    torn = settings_for(world, tmp_path / "torn", **more)
    child = multiprocessing.get_context("fork").Process(target=stopped, args=(torn,))
    child.start()
    child.join()
    assert child.exitcode == 0 and find_checkpoints(tmp_path / "torn")
    run.train(torn)
    assert losses(whole) == losses(tmp_path / "torn") and len(losses(whole)) == 5
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "torn"))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_stream_goes_on_with_as_many_workers_only(world, tmp_path):
    settings = settings_for(world, tmp_path)
    fixed = run.identity(settings, ranks=1)
    settings.data.workers += 1
    assert run.identity(settings, ranks=1) != fixed
    settings.data.streaming = False
    assert "data.workers" not in run.identity(settings, ranks=1)


def test_lengths_and_a_stream_exclude_each_other(world, tmp_path):
    with pytest.raises(ValueError, match=r"data\.streaming=true with data\.group_by_length=true"):
        settings_for(world, tmp_path, **{"data.group_by_length": True})
