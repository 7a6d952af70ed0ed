"""The order of rows: complete, reproducible, alike within a round, mixed between rounds."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from accelerate import Accelerator, skip_first_batches
from golden import golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from proxyv.data.sampler import GroupedSampler, RowSampler


@st.composite
def shapes(draw):
    rows = draw(st.integers(1, 120))
    return {
        "lengths": draw(st.lists(st.integers(1, 500), min_size=rows, max_size=rows)),
        "has_image": draw(st.lists(st.booleans(), min_size=rows, max_size=rows)),
        "micro_batch": draw(st.integers(1, 5)),
        "ranks": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 99)),
        "pool_rounds": draw(st.integers(1, 8)),
    }


@settings(max_examples=150, deadline=None)
@given(shapes(), st.integers(0, 5))
def test_grouped_order(shape, epoch):
    sampler = GroupedSampler(**shape)
    order = sampler.order(epoch)
    assert sorted(order.tolist()) == list(range(len(sampler)))
    assert (GroupedSampler(**shape).order(epoch) == order).all()  # nothing is remembered
    kind = np.array(shape["has_image"])[order]
    size = shape["micro_batch"] * shape["ranks"]
    whole = sum(int((kind == k).sum()) // size for k in (True, False)) * size
    for start in range(0, whole, size):
        assert len(set(kind[start : start + size])) == 1
    assert len(order) - whole < 2 * size
    assert list(kind[whole:]) == sorted(kind[whole:], reverse=True)
    lengths = np.array(shape["lengths"])[order]
    if whole:
        assert lengths[:size].max() == lengths[:whole].max()
    for start in range(0, whole, size):  # the ranks' micro-batches are neighbours in length
        assert all(a >= b for a, b in pairwise(lengths[start : start + size]))


def test_grouped_passes_and_seeds_differ():
    lengths, has_image = np.arange(80) % 7 + 1, np.arange(80) % 3 > 0
    orders = [
        GroupedSampler(lengths, has_image, 2, 2, seed=seed).order(epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    rounds = [
        {frozenset(order[at : at + 4].tolist()) for at in range(0, 80, 4)} for order in orders
    ]
    assert all(rounds[0] != other for other in rounds[1:])  # not the same company in another order


def test_passes_and_seeds_differ_and_cover_every_row():
    sampler = RowSampler(50, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    other = list(RowSampler(50, seed=4))
    assert first != other != second  # nor is it the next pass of this one
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_steps_see_long_and_short_rows():
    lengths = np.arange(1, 80 * 512 + 1)
    order = GroupedSampler(lengths, np.ones(len(lengths)), 4, 8, seed=0).order(0)
    steps = lengths[order].reshape(80, 512).mean(axis=1)  # 16 accumulated rounds of 32 rows
    assert steps.std() < 0.2 * lengths.mean()


def padding_share(order: np.ndarray, lengths, micro_batch: int) -> float:
    """Share of the positions of all micro-batches that is padding."""
    sizes = np.asarray(lengths, dtype=np.int64)[order]
    positions = sum(
        int(batch.max()) * len(batch)
        for batch in (sizes[at : at + micro_batch] for at in range(0, len(sizes), micro_batch))
    )
    return 1.0 - int(sizes.sum()) / positions if positions else 0.0


def test_padding_share_by_hand():
    assert padding_share(np.array([0, 1, 2]), [4, 2, 3], 2) == pytest.approx(1 - 9 / 11)
    assert padding_share(np.array([], dtype=int), [], 2) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_image": [True]}, "one of each for every row"),
        ({"ranks": 0}, "ranks=0: must be at least 1"),
    ],
)
def test_wrong_shapes_are_refused(changes, message):
    arguments = {"lengths": [1, 2], "has_image": [True, False], "micro_batch": 1, "ranks": 1}
    with pytest.raises(ValueError, match=message):
        GroupedSampler(**{**arguments, **changes}, seed=0)


def test_a_prepared_loader_skips_to_where_it_was():
    """What the trainer does on resuming: set the pass, then skip the batches already done."""
    sampler = GroupedSampler(np.arange(1, 41), np.ones(40), 2, 1, seed=5)
    loader = Accelerator(cpu=True).prepare(DataLoader(range(40), batch_size=2, sampler=sampler))
    loader.set_epoch(3)
    batches = [batch.tolist() for batch in loader]
    assert batches == sampler.order(3).reshape(-1, 2).tolist()
    resumed = skip_first_batches(loader, 7)
    resumed.set_epoch(3)
    assert [batch.tolist() for batch in resumed] == batches[7:]


@pytest.mark.golden
def test_less_padding_than_the_reference_orders():
    """On the reference's own lengths (negative: text only), at its batch sizes, taken together."""
    files = golden_files("templates/*_sampler.json")
    if not files:
        pytest.skip("PROXYV_GOLDEN names no folder with templates/*_sampler.json")
    shares = []
    for case in [case for file in files for case in json.loads(file.read_text("utf-8"))]:
        signed = np.array(case["lengths"])
        lengths, micro = np.abs(signed), case["batch_size"]
        ours = GroupedSampler(lengths, signed > 0, micro, 2, seed=case["seed"]).order(0)
        reference = np.array(case["indices"])
        assert sorted(reference) == sorted(ours)
        shares.append([padding_share(order, lengths, micro) for order in (ours, reference)])
    ours, theirs = np.mean(shares, axis=0)  # a few rows in large batches leave nothing to choose
    assert ours < theirs
