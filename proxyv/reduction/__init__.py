"""Token reduction: methods that drop or merge vision tokens, behind one small interface.

A method is a frozen object of options, made by ``build_reduction({"method": "fastv", "layer": 2})``
and listed again by ``options()``. It acts at one stage, and there the model calls it:

=========== =============================================== ======================================
stage       methods                                         call
=========== =============================================== ======================================
image       downsample                                      ``shrink(pixels, patch_px)``
tower       visionzip, prumerge, average_pool, random_drop  ``reduce(TowerStates) -> CropTokens``
projector   tokenpacker                                     ``build(...) -> nn.Module``
decoder     fastv, pyramiddrop, fitprune                    ``run_reduced(model, method, ...)``
=========== =============================================== ======================================

How a model takes them in:

* ``ProxyVConfig`` holds the mapping (``reduction``, None for none), builds the method to check it,
  and asks ``check_combination`` whether it goes with the ProxyV layers.
* ``tokens_per_crop`` of the method replaces ``side ** 2`` wherever rows are counted; where it is
  None the image decides: s*s rows are reserved for each crop, and some stay empty.
* Methods of the stages image and tower run inside ``tower_features``. Nothing is hooked: queries
  and keys are made from the hidden state that enters the layer that ``attention_layer`` names.
* Grids survive average_pool, downsample and tokenpacker (``keeps_grid``), so spatial proxies can
  be made of them. Other crops want learned proxies.
* projector: ``build`` in place of the stock projector; its features are those of all layers that
  ``vision_feature_layer`` names, and ``_init_weights`` calls its ``init_weights``.
* decoder: ``run_reduced`` in place of the stock loop over the layers. ``Rows.restore`` puts the
  last hidden states back among the S rows, so that labels, loss and generation stay as they are.
  What decoding needs to know of the stages lies on the cache as ``proxyv_stages``; beams of one
  sample share it. Where a prompt is read again with an answer behind it, ``judges`` has to name
  the prompt's last row.
* decoder with ProxyV layers: rows that leave before or among them leave the layout too
  (``SequenceLayout.keep``). ``FitPrune`` needs image tokens as queries, which ProxyV layers do not
  have: its scheme has to end before ``start_layer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from proxyv.cli import nearest
from proxyv.reduction.average_pool import AveragePool
from proxyv.reduction.base import (
    CropTokens,
    DecoderReduction,
    ImageReduction,
    ProjectorReduction,
    Reduction,
    TowerReduction,
    TowerStates,
)
from proxyv.reduction.combination import check_combination
from proxyv.reduction.decoding import run_reduced
from proxyv.reduction.downsample import Downsample
from proxyv.reduction.fastv import FastV
from proxyv.reduction.fitprune import FitPrune
from proxyv.reduction.prumerge import PruMerge
from proxyv.reduction.pyramiddrop import PyramidDrop
from proxyv.reduction.random_drop import RandomDrop
from proxyv.reduction.rows import Rows
from proxyv.reduction.tokenpacker import TokenPacker
from proxyv.reduction.tower import tower_states
from proxyv.reduction.visionzip import VisionZip

__all__ = [
    "METHODS",
    "AveragePool",
    "CropTokens",
    "DecoderReduction",
    "Downsample",
    "FastV",
    "FitPrune",
    "ImageReduction",
    "ProjectorReduction",
    "PruMerge",
    "PyramidDrop",
    "RandomDrop",
    "Reduction",
    "Rows",
    "TokenPacker",
    "TowerReduction",
    "TowerStates",
    "VisionZip",
    "build_reduction",
    "check_combination",
    "run_reduced",
    "tower_states",
]

METHODS: dict[str, type[Reduction]] = {
    method.name: method
    for method in (
        AveragePool,
        Downsample,
        FastV,
        FitPrune,
        PruMerge,
        PyramidDrop,
        RandomDrop,
        TokenPacker,
        VisionZip,
    )
}


def build_reduction(options: Mapping[str, Any]) -> Reduction:
    """Make a method from a configuration's mapping.

    Args:
        options: ``method``, one of ``METHODS``, and any of its options.

    Raises:
        ValueError: an unknown method or option, one that is missing, or a value out of range.
    """
    values = dict(options)
    name = values.pop("method", None)
    if name is None:
        raise ValueError(
            f"reduction has no 'method', only {sorted(values)}: name one of "
            f"{', '.join(sorted(METHODS))}"
        )
    method = METHODS.get(name)
    if method is None:
        raise ValueError(nearest("reduction.method", str(name), METHODS))
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    for option in values:
        if option not in {field.name for field in fields}:
            raise ValueError(nearest(f"option of {name}", option, [f.name for f in fields]))
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"reduction method {name!r} needs the option {field.name!r}")
    return method(**values)
