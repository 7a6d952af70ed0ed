"""Where the rows of a benchmark come from: the hub, or a folder given by ``--data``.

A folder DIR holds one folder for each task, ``DIR/docvqa`` for instance, in one of three forms:

- parquet files whose names begin with the split (``validation.parquet``,
  ``data/validation-00000-of-00006.parquet``),
- what ``datasets`` writes with ``save_to_disk``,
- one ``.json`` or ``.jsonl`` file of rows, with image paths relative to the folder.

Images stay undecoded in the rows, so that one corrupt image costs one sample and not the run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import Benchmark
from proxyv.eval.hub import hub_reachable

__all__ = ["Rows", "load_rows"]

SPLIT_NAMES = ("train", "val", "validation", "dev", "test")


@dataclass(frozen=True)
class Rows:
    """The rows of one benchmark.

    Attributes:
        table: the rows; images are undecoded.
        origin: where they came from, for messages and result files.
        folder: folder that relative image paths start from, None for the hub.
    """

    table: Sequence[Mapping[str, Any]]
    origin: str
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row, its image still encoded."""
        return self.table[index]

    def text(self, index: int) -> Mapping[str, Any]:
        """One row without its image, which need not be read then."""
        return self._texts[index]

    @functools.cached_property
    def _texts(self) -> Sequence[Mapping[str, Any]]:
        remove = getattr(self.table, "remove_columns", None)
        return self.table if remove is None else remove(["image"])


def load_rows(benchmark: Benchmark, data: Path | None = None) -> Rows:
    """Load the rows of a benchmark, from ``data`` where it is given and else from the hub.

    Raises:
        CommandError: nothing usable is there; the message says what was looked for.
    """
    rows = _from_hub(benchmark) if data is None else _from_folder(benchmark, data)
    if not len(rows):
        raise CommandError(f"{benchmark.name}: {rows.origin} has no rows")
    present = _columns(rows.table)
    missing = [column for column in benchmark.columns if column not in present]
    if missing:
        raise CommandError(
            f"{benchmark.name}: {rows.origin} lacks the column{'s' * (len(missing) > 1)} "
            f"{', '.join(map(repr, missing))} (it has {', '.join(map(repr, sorted(present)))})"
        )
    return rows


def _columns(table: Any) -> set[str]:
    if hasattr(table, "column_names"):
        return set(table.column_names)
    return {column for row in table for column in row}


def _from_hub(benchmark: Benchmark) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    advice = (
        f"give --data DIR with the folder DIR/{benchmark.name}, or make the local small world: "
        "python -m proxyv.synthetic --out DIR, then --data DIR"
    )
    offline = constants.HF_HUB_OFFLINE
    if not offline and not hub_reachable():
        raise CommandError(
            f"{benchmark.name}: the Hugging Face hub ({constants.ENDPOINT}) cannot be reached, so "
            f"{benchmark.repositories[0]} cannot be loaded; {advice} (an earlier download is used "
            "with HF_HUB_OFFLINE=1)"
        )
    reasons = []
    for repository in benchmark.repositories:
        try:
            table = load_dataset(repository, benchmark.config, split=benchmark.split)
        except (DatasetNotFoundError, ConnectionError, ValueError) as error:
            reasons.append(f"{repository}: {error}")
            continue
        return Rows(_undecoded(table), f"hub:{repository}/{benchmark.split}")
    why = "HF_HUB_OFFLINE=1 and no earlier download was found" if offline else "; ".join(reasons)
    raise CommandError(f"{benchmark.name}: not loaded from the hub ({why}); {advice}")


def _undecoded(table: Any) -> Any:
    """Keep the images of a ``datasets`` table as bytes or paths."""
    from datasets import Image as ImageFeature

    for column, feature in table.features.items():
        if isinstance(feature, ImageFeature):
            table = table.cast_column(column, ImageFeature(decode=False))
    return table


def _from_folder(benchmark: Benchmark, data: Path) -> Rows:
    if not data.is_dir():
        raise CommandError(f"--data {data}: no such folder")
    folder = data / benchmark.name
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir())) or "none"
        raise CommandError(
            f"--data {data}: no folder {benchmark.name!r} in it (folders found: {found})"
        )
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Rows(_saved_table(benchmark, folder), str(folder), folder)
    parquet = _parquet_files(benchmark, folder)
    if parquet:
        return Rows(_parquet_table(benchmark, parquet), str(folder), folder)
    lists = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if len(lists) == 1:
        return Rows(_json_rows(lists[0]), str(lists[0]), folder)
    raise CommandError(
        f"{benchmark.name}: {folder} holds {len(lists) or 'no'} JSON files and no parquet file of "
        f"the split {benchmark.split!r}; needed is {benchmark.split}*.parquet, a save_to_disk "
        "folder, or exactly one .json or .jsonl file with its images"
    )


def _saved_table(benchmark: Benchmark, folder: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    if isinstance(saved, DatasetDict):
        if benchmark.split not in saved:
            raise CommandError(
                f"{benchmark.name}: {folder} has no split {benchmark.split!r} "
                f"(it has {', '.join(saved)})"
            )
        saved = saved[benchmark.split]
    return _undecoded(saved)


def _parquet_table(benchmark: Benchmark, files: Sequence[Path]) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        table = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, ValueError) as error:  # ArrowInvalid is a ValueError
        names = ", ".join(map(str, files))
        reason = error.__cause__ or error
        raise CommandError(f"{benchmark.name}: {names} cannot be read ({reason})") from error
    return _undecoded(table)


def _parquet_files(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Parquet files of the split; files of another split are never taken instead."""
    places = [folder, folder / "data"]
    if benchmark.config:
        places.append(folder / benchmark.config)
    files = sorted(path for place in places for path in place.glob("*.parquet"))
    wanted = [path for path in files if path.stem.startswith(benchmark.split)]
    named = [path for path in files if path.stem.startswith(SPLIT_NAMES)]
    return wanted or ([] if named else files)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CommandError(f"{path}: a list of rows (JSON objects) is needed")
    return rows
