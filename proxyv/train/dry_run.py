"""What a run would do, without doing it: settings, what trains, cost, batch and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxyv.train.arguments import accumulation_steps, deepspeed_config, total_steps
from proxyv.train.build import build_on_meta, output_folder
from proxyv.train.config_files import settings_yaml
from proxyv.train.cost import RowShape, row_flops, step_memory, trained_parts
from proxyv.train.run import open_data, parts_table
from proxyv.train.settings import Settings
from proxyv.train.stages import count_parts

__all__ = ["dry_run"]

_TEXT = 300  # text tokens of a typical row, 200 of them supervised
_SUPERVISED = 200


def dry_run(settings: Settings, ranks: int) -> str:
    """Describe a run; the model is built on the meta device, so it costs no memory.

    Raises:
        ValueError: settings that cannot be run.
        OSError: the model's configuration cannot be found.
    """
    model = build_on_meta(settings)
    accumulation = accumulation_steps(settings, ranks)
    parts = count_parts(model)
    lines = [
        settings_yaml(settings).rstrip(),
        "",
        f"folder: {output_folder(settings)}",
        *parts_table(parts, settings),
        f"ranks: {ranks}, of this machine or given (NPROC=8 before the script: as on eight GPUs)",
        f"effective batch: {ranks} ranks x {settings.optim.micro_batch} rows x {accumulation} "
        f"accumulated = {settings.optim.global_batch}",
        f"data: {_length(settings, ranks)}",
        *_cost(settings, model.config, parts, ranks),
    ]
    return "\n".join(lines)


def _cost(settings: Settings, config: Any, parts: list[Any], ranks: int) -> list[str]:
    """FLOPs and tokens of a step, and memory."""
    crops = most_crops(settings, config)
    row = RowShape(crops, _TEXT, _SUPERVISED)
    step = settings.optim.global_batch * sum(row_flops(config, row, trained_parts(parts)).values())
    tokens = crops * config.rows_per_crop + _TEXT
    zero = (deepspeed_config(settings) or {}).get("zero_optimization", {})
    memory = step_memory(config, settings, parts, zero, ranks, crops)
    return [
        f"row of {crops} crop{'s' * (crops > 1)} and {_TEXT} text tokens: {tokens:,} tokens",
        f"step: {settings.optim.global_batch * tokens:,} tokens, {step:.3e} FLOPs",
        f"memory: {memory.line()}, rows of {settings.data.max_length} tokens",
    ]


def most_crops(settings: Settings, config: Any) -> int:
    """Crops of the largest image."""
    if settings.data.image_aspect_ratio == "pad":
        return 1
    side = config.vision_config.image_size
    grids = settings.data.image_grid_pinpoints
    return 1 + max((height // side) * (width // side) for height, width in grids)


def _length(settings: Settings, ranks: int) -> str:
    """Rows and steps, from the data where it is on this machine."""
    data = settings.data
    if Path(data.annotations).exists():
        rows, origin = len(open_data(settings)), "rows"
    elif data.expected_rows is not None:
        rows, origin = data.expected_rows, "rows expected (the set is not on this machine)"
    elif settings.optim.max_steps is not None:
        return f"{settings.optim.max_steps:,} steps (optim.max_steps)"
    else:
        return f"steps unknown: {data.annotations} is not on this machine"
    rows = rows if data.limit is None else min(rows, data.limit)
    return f"{rows:,} {origin}, {total_steps(settings, rows, ranks):,} steps"
