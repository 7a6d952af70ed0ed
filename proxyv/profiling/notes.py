"""What stands above and below the tables: the setting, and what a number means."""

from __future__ import annotations

from collections.abc import Sequence

from proxyv.model.flops import RowTokens
from proxyv.profiling.arms import Arm, Inputs
from proxyv.profiling.shapes import describe_methods

__all__ = ["methods_note", "setting_of", "shape_of", "times_note", "training_note"]


def times_note(arms: Sequence[Arm], row: RowTokens) -> str:
    """The note below every table of times."""
    return (
        "Decoder only; the baseline is the stock class. Spread: distance of the quartiles, of the "
        "extremes below four rounds. Time ratio: median of the rounds' ratios. FLOPs as run."
    ) + methods_note(arms, row)


def methods_note(arms: Sequence[Arm], row: RowTokens) -> str:
    """The options of token-reduction arms, and what of them is timed; empty without any."""
    found = [arm.config.reduction for arm in arms if arm.config.reduction is not None]
    methods = [method for place, method in enumerate(found) if method not in found[:place]]
    if not methods:
        return ""
    return describe_methods(methods, row.kept) + (
        " What a method computes at the tower, and what it spares there, is not timed; what it "
        "computes inside the decoder is. The rows are random, so the crops lose unevenly, and "
        "ProxyV layers pad them to the longest."
    )


def training_note(checkpointing: bool) -> str:
    """What a training step is."""
    how = "with gradient checkpointing" if checkpointing else "without checkpointing"
    return (
        f" Training: forward and backward of all weights, {how}; its FLOPs are taken as "
        f"{4 if checkpointing else 3} forward passes."
    )


def shape_of(arm: Arm) -> str:
    """Depth, width, attention and type of the weights."""
    text = arm.model.config
    dtype = str(next(arm.model.parameters()).dtype).removeprefix("torch.")
    return (
        f"{text.num_hidden_layers} layers, D {text.hidden_size}, {text._attn_implementation}, "
        f"{dtype}"
    )


def setting_of(arm: Arm, inputs: Inputs) -> str:
    """The same, and the rows that are read."""
    row, batch = inputs.row, inputs.rows.shape[0]
    rows = f"{row.crops} crops + {row.text} text tokens"
    return f"{shape_of(arm)}, {rows} = {inputs.rows.shape[1]} rows, batch {batch}"
