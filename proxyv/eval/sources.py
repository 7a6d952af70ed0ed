"""Where the rows of a benchmark come from: the hub, or a folder given by ``--data``.

A folder DIR holds one folder for each task, ``DIR/docvqa`` for instance, in one of three forms:

- parquet files of the split (``validation.parquet``, or ``validation-00000-of-00006.parquet`` and
  the others) in the folder itself, its ``data``, or the folder of a configuration, whichever of
  these is the first to have any,
- what ``datasets`` writes with ``save_to_disk``,
- one ``.json`` or ``.jsonl`` file of rows (or one for each split, named after it), with image
  paths relative to the folder.

The images of GQA may be in a folder of their own, ``DIR/gqa/testdev_balanced_images``.

Images stay undecoded in the rows, so that one corrupt image costs one sample and not the run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import Benchmark
from proxyv.eval.hub import hub_reachable

__all__ = ["Pictures", "Rows", "load_rows"]

SPLIT_NAMES = ("train", "val", "validation", "dev", "test")
_PART_NUMBER = r"-\d+(-of-\d+(-[0-9a-f]+)?)?"  # the hub once put a hash after the numbers


@dataclass(frozen=True)
class Rows:
    """The rows of one benchmark, one for each question.

    Attributes:
        table: the rows of the data set; images are undecoded.
        origin: where they came from, for messages and result files.
        folder: folder that relative image paths start from, None for the hub.
        picks: for each question its row in the table and the columns in which it differs from it;
            None where every row is one question.
        pictures: where the images are, if not in the table.
    """

    table: Sequence[Mapping[str, Any]]
    origin: str
    folder: Path | None = None
    picks: Sequence[tuple[int, Mapping[str, Any]]] | None = None
    pictures: Pictures | None = None

    def __len__(self) -> int:
        return len(self.table if self.picks is None else self.picks)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row, its image still encoded."""
        row = self._pick(self.table, index)
        return row if self.pictures is None else {**row, "image": self.pictures.find(row)}

    def text(self, index: int) -> Mapping[str, Any]:
        """One row without its encoded image, which need not be read then; a path may be there."""
        return self._pick(self._texts, index)

    def _pick(self, table: Sequence[Mapping[str, Any]], index: int) -> Mapping[str, Any]:
        if self.picks is None:
            return table[index]
        place, changes = self.picks[index]
        return {**table[place], **changes} if changes else table[place]

    @functools.cached_property
    def _texts(self) -> Sequence[Mapping[str, Any]]:
        return _without_images(self.table)


@dataclass(frozen=True)
class Pictures:
    """The images of a table, in another table.

    Attributes:
        table: the images, undecoded.
        key: column of the questions that names an image.
        name: column of the images that holds that name.
        folder: folder that relative image paths start from, None for the hub.
    """

    table: Sequence[Mapping[str, Any]]
    key: str
    name: str
    folder: Path | None = None

    def find(self, row: Mapping[str, Any]) -> Any:
        """The encoded image of a row; None where there is none of that name."""
        wanted = row.get(self.key)
        place = None if wanted is None else self._places.get(str(wanted))
        cell = None if place is None else self.table[place].get("image")
        return str(self.folder / cell) if self.folder and isinstance(cell, str) else cell

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        names = _without_images(self.table)
        return {str(names[place].get(self.name)): place for place in range(len(names))}


def load_rows(benchmark: Benchmark, data: Path | None = None) -> Rows:
    """Load the rows of a benchmark, from ``data`` where it is given and else from the hub.

    Raises:
        CommandError: nothing usable is there; the message says what was looked for.
    """
    rows = _from_hub(benchmark) if data is None else _from_folder(benchmark, data)
    if not len(rows.table):
        raise CommandError(f"{benchmark.name}: {rows.origin} has no rows")
    needed = (*benchmark.columns, "image") if benchmark.image_table else benchmark.columns
    if rows.pictures is not None:
        needed = benchmark.columns
        _check_columns(
            benchmark, rows.pictures.table, f"{rows.origin} (images)", [rows.pictures.name, "image"]
        )
    _check_columns(benchmark, rows.table, rows.origin, needed)
    picks = [
        (place, changes)
        for place in range(len(rows))
        for changes in benchmark.questions(rows.text(place))
    ]
    if not picks:
        raise CommandError(
            f"{benchmark.name}: none of the {len(rows)} rows of {rows.origin} belongs to it"
        )
    for place, _ in picks if benchmark.needs_id else ():
        try:
            benchmark.check_id(rows.text(place))
        except ValueError as error:
            raise CommandError(f"{benchmark.name}: row {place} of {rows.origin} {error}") from error
    return dataclasses.replace(rows, picks=picks)


def _check_columns(benchmark: Benchmark, table: Any, origin: str, needed: Sequence[str]) -> None:
    present = _columns(table)
    missing = [column for column in needed if not present & set(column.split("|"))]
    if missing:
        raise CommandError(
            f"{benchmark.name}: {origin} lacks the column{'s' * (len(missing) > 1)} "
            f"{', '.join(repr(column.replace('|', ' or ')) for column in missing)} (it has "
            f"{', '.join(map(repr, sorted(present)))})"
        )


def _without_images(table: Any) -> Any:
    """The table without encoded images; paths, which tell where an image is from, stay."""
    features = getattr(table, "features", {})  # of a ``datasets`` table
    if "image" not in features:
        return table
    cell = getattr(features["image"], "feature", features["image"])  # of a list of images
    is_path = getattr(cell, "dtype", None) in ("string", "large_string")
    return table if is_path else table.remove_columns(["image"])


def _columns(table: Any) -> set[str]:
    if hasattr(table, "column_names"):
        return set(table.column_names)
    return {column for row in table for column in row}


def _from_hub(benchmark: Benchmark) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # of httpx or its successor, as the hub's client

    advice = (
        f"give --data DIR with the folder DIR/{_folder_name(benchmark)}, or make the local small "
        "world: python -m proxyv.synthetic --out DIR, then --data DIR"
    )
    if not benchmark.repositories:
        raise CommandError(f"{benchmark.name}: there is no table of it on the hub; {advice}")
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
            pictures = None
            if benchmark.image_table is not None and "image" not in table.column_names:
                config, key, name = benchmark.image_table
                images = load_dataset(repository, config, split=benchmark.split)
                pictures = Pictures(_undecoded(images), key, name)
        except (HTTPError, OSError, DatasetsError, ValueError) as error:
            reasons.append(f"{repository}: {error}")
            continue
        origin = f"hub:{repository}/{benchmark.split}"
        return Rows(_undecoded(table), origin, pictures=pictures)
    why = "; ".join(reasons)
    if offline:
        why = f"HF_HUB_OFFLINE=1 and no earlier download was found: {why}"
    raise CommandError(f"{benchmark.name}: not loaded from the hub ({why}); {advice}")


def _undecoded(table: Any) -> Any:
    """Keep the images of a ``datasets`` table as bytes or paths."""
    from datasets import Image as ImageFeature
    from datasets import List

    encoded = ImageFeature(decode=False)
    for column, feature in table.features.items():
        if isinstance(feature, ImageFeature):
            table = table.cast_column(column, encoded)
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            table = table.cast_column(column, List(encoded))
    return table


def _from_folder(benchmark: Benchmark, data: Path) -> Rows:
    if not data.is_dir():
        raise CommandError(f"--data {data}: no such folder")
    name = _folder_name(benchmark)
    folder = data / name
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir())) or "none"
        raise CommandError(f"--data {data}: no folder {name!r} in it (folders found: {found})")
    table, origin = _folder_table(benchmark, folder, [benchmark.config])
    pictures = None
    if benchmark.image_table is not None and "image" not in _columns(table):
        config, key, column = benchmark.image_table
        images = folder / config
        if not images.is_dir():
            raise CommandError(
                f"{benchmark.name}: {origin} has no column 'image', and there is no folder "
                f"{images} with the images"
            )
        pictures = Pictures(_folder_table(benchmark, images, [])[0], key, column, images.resolve())
    return Rows(table, str(origin), folder, pictures=pictures)


def _folder_name(benchmark: Benchmark) -> str:
    return benchmark.folder or benchmark.name


def _folder_table(
    benchmark: Benchmark, folder: Path, configs: Sequence[str | None]
) -> tuple[Any, Path]:
    """The table in a folder, and the file or folder it was read from."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_table(benchmark, folder), folder
    places = [folder, folder / "data", *(folder / config for config in configs if config)]
    parquet = _split_files(benchmark, places, "*.parquet")
    if parquet:
        return _parquet_table(benchmark, parquet), folder
    lists = _split_files(benchmark, [folder], "*.json", "*.jsonl")
    if len(lists) == 1:
        return _json_rows(lists[0]), lists[0]
    raise CommandError(
        f"{benchmark.name}: {folder} holds {len(lists) or 'no'} JSON files and no parquet file of "
        f"the split {benchmark.split!r}; needed is {benchmark.split}.parquet (or "
        f"{benchmark.split}-00000-of-00001.parquet and so on), a save_to_disk folder, or exactly "
        f"one .json or .jsonl file with its images, such as {benchmark.split}.jsonl"
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


def _split_files(benchmark: Benchmark, places: Sequence[Path], *patterns: str) -> list[Path]:
    """Files of the split, all from one place and either whole or in numbered parts.

    Files of another split are never taken instead.
    """
    part = re.compile(re.escape(benchmark.split) + _PART_NUMBER)
    found = [
        sorted({path for pattern in patterns for path in place.glob(pattern)}) for place in places
    ]
    for files in found:
        whole = [path for path in files if path.stem == benchmark.split]
        if wanted := whole or [path for path in files if part.fullmatch(path.stem)]:
            return wanted
    if any(path.stem.startswith(SPLIT_NAMES) for files in found for path in files):
        return []
    return next((files for files in found if files), [])


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":  # a text may hold what splitlines() takes for ends of lines
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CommandError(f"{path}: a list of rows (JSON objects) is needed")
    return rows
