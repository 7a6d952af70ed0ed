"""What a run would do, without doing it: settings, what trains, batch and steps."""

from __future__ import annotations

from pathlib import Path

from proxyv.train.arguments import accumulation_steps, total_steps
from proxyv.train.build import build_on_meta, output_folder
from proxyv.train.config_files import settings_yaml
from proxyv.train.run import open_data, parts_table
from proxyv.train.settings import Settings
from proxyv.train.stages import apply_stage, count_parts

__all__ = ["dry_run"]


def dry_run(settings: Settings, ranks: int) -> str:
    """Describe a run; the model is built on the meta device, so it costs no memory.

    Raises:
        ValueError: settings that cannot be run.
        OSError: the model's configuration cannot be found.
    """
    model = build_on_meta(settings)
    apply_stage(model, settings.stage.name)
    accumulation = accumulation_steps(settings, ranks)
    lines = [
        settings_yaml(settings).rstrip(),
        "",
        f"folder: {output_folder(settings)}",
        *parts_table(count_parts(model), settings),
        f"effective batch: {ranks} ranks x {settings.optim.micro_batch} rows x {accumulation} "
        f"accumulated = {settings.optim.global_batch}",
        f"data: {_length(settings, ranks)}",
    ]
    return "\n".join(lines)


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
