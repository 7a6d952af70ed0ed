"""The FLOPs formula against torch's counter; what training adds; devices."""

from __future__ import annotations

import pytest
import torch
from tiny_models import collate, sample, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from proxyv.train.cost import RowShape, peak_flops, row_flops, trained_parts
from proxyv.train.stages import PartCount


@pytest.mark.parametrize(
    "options",
    [
        {"start_layer": None},
        {"start_layer": 1},
        {"start_layer": 3},
        {"start_layer": 1, "proxy_kind": "learned"},
    ],
    ids=str,
)
def test_formula_is_what_torch_counts(options):
    model = tiny_model(attention="eager", **options)
    ids, images = sample([5, "3", 9], model.config, torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[-4:] = ids[-4:]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**collate([(ids, images)]), labels=labels[None], loss_only=True)
    expected = row_flops(model.config, RowShape(crops=3, text=14, supervised=4))
    assert sum(expected.values()) == counter.get_total_flops()


def test_frozen_parts_cost_less():
    config = tiny_model().config
    row = RowShape(crops=2, text=20, supervised=10)
    forward = row_flops(config, row)
    step = row_flops(config, row, {"projector", "proxyv"})
    assert {part: step[part] / forward[part] for part in forward} == {
        "vision_tower": 1,
        "projector": 3,
        "language_model": 2,
        "proxyv": 3,
        "lm_head": 2,
    }


def test_a_part_of_which_adapters_train_is_frozen():
    parts = [("projector", 10, 10), ("proxyv", 9, 6), ("language_model", 100, 2), ("lm_head", 7, 0)]
    assert trained_parts([PartCount(*part) for part in parts]) == {"projector", "proxyv"}


def test_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("AMD EPYC") is None
