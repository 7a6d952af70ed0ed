"""Reading settings: YAML files that build on a ``base:``, then ``section.name=value`` overrides.

An unknown key is refused with the nearest known one; a value of the wrong type names its place. A
setting that is a mapping is replaced as a whole, but for ``section.name.key=value``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from proxyv.cli import nearest
from proxyv.train.settings import Settings, check_settings, walk

__all__ = [
    "describe_settings",
    "load_settings",
    "preset_file",
    "read_chain",
    "settings_of",
    "settings_yaml",
]

_REPOSITORY = Path(__file__).resolve().parents[2]


def preset_file(preset: str, stage: str) -> Path:
    """Find a preset's file for a stage, under ``configs/`` here or beside the package.

    Preset ``tiny`` is ``tiny/STAGE.yaml``, preset ``tiny-baseline`` is
    ``tiny/STAGE-baseline.yaml``.

    Raises:
        ValueError: no such preset, naming the nearest.
    """
    found: dict[str, Path] = {}
    for folder in (_REPOSITORY / "configs", Path("configs")):
        for path in folder.glob(f"*/{stage}*.yaml"):
            found[path.parent.name + path.stem.removeprefix(stage)] = path
    if preset not in found:
        model = max((n for n in found if preset.startswith(f"{n}-")), key=len, default=None)
        of_model = [n for n in found if n == model or n.startswith(f"{model}-")]
        raise ValueError(nearest("preset", preset, of_model or found))
    return found[preset]


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file, what it builds on, and overrides; the last word counts.

    Args:
        path: the file; its ``base:`` (one file or a list, the last counts) is relative to it.
        overrides: ``section.name=value``, values as in YAML (``null``, ``1e-4``, ``[1, 2]``); of a
            setting that is text, ``null``, nothing, what is in quotes, or else the text as it is.

    Raises:
        FileNotFoundError: the file, or one that it builds on, does not exist.
        ValueError: an unknown key, a value of the wrong type, or values that contradict.
    """
    return _merged([*read_chain(Path(path)), *map(_override, overrides)])


def settings_of(content: Mapping[str, Any], source: str) -> Settings:
    """Settings from their sections as a mapping, such as a JSON file holds them.

    Args:
        content: values by section and name; the others have their defaults.
        source: what an error names.

    Raises:
        ValueError: see `load_settings`.
    """
    return _merged([(source, dict(content))])


def _merged(parts: Iterable[tuple[str, dict[str, Any]]]) -> Settings:
    merged = OmegaConf.structured(Settings)
    for source, content in parts:
        _check_keys(source, content)
        try:
            _replace(merged, content)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "a section"
            reason = str(error).splitlines()[0]
            raise ValueError(f"{source}: {key}: {reason}") from error
    return check_settings(cast(Settings, OmegaConf.to_object(merged)))


def read_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Names and contents of a YAML file and of what it builds on, the deepest base first.

    Args:
        path: the file.
        seen: files that led to it.

    Raises:
        FileNotFoundError: the file, or one that it builds on, does not exist.
        ValueError: no YAML mapping, or a base that leads back to its own file.
    """
    if not path.is_file():
        wanted_by = f" (base of {seen[-1]})" if seen else ""
        raise FileNotFoundError(f"no config file {path}{wanted_by}")
    if path.resolve() in seen:
        raise ValueError(f"{path}: its base leads back to itself")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected sections such as 'model:', got {content!r}")
    base = content.pop("base", None) or []
    before = [
        part
        for name in (base if isinstance(base, list) else [base])
        for part in read_chain(path.parent / str(name), (*seen, path.resolve()))
    ]
    return [*before, (str(path), cast(dict[str, Any], content))]


def _replace(merged: Any, content: Mapping[str, Any]) -> None:
    """Put the settings of a source in the place of earlier ones, mappings and lists as a whole."""
    for section, part in content.items():
        for name, value in part.items():
            OmegaConf.update(merged, f"{section}.{name}", value, merge=False)


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """Name and content of an override; ``section.name.key`` stands under ``name.key``.

    YAML would make a number of ``2026_10_01``, false of ``no`` and a comment of what follows a
    space and ``#``: a path or a name is taken as it is.
    """
    key, sign, value = text.partition("=")
    source = f"override {text!r}"
    if not sign or not key:
        raise ValueError(f"{source}: expected section.name=value, such as optim.lr=4e-5")
    section, _, name = key.partition(".")
    kinds = {known: str(item.type) for known, _, item in walk(Settings())}
    is_text = kinds.get(key) in ("str", "str | None")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if is_text and value not in ("", "null") and not quoted:
        return source, {section: {name: value}}
    try:
        read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    given = cast(dict[str, Any], read)["value"]
    return source, {section: {name: given} if name else given}


def _check_keys(source: str, content: Mapping[str, Any]) -> None:
    known = {key: value for key, value, _ in walk(Settings())}
    sections = [item.name for item in fields(Settings)]
    for section, part in content.items():
        if section not in sections:
            leaf = next(iter(part)) if isinstance(part, Mapping) and part else section
            full = difflib.get_close_matches(
                f"{section}.{leaf}", known, n=1, cutoff=0.8
            ) or _by_leaf(str(leaf), known)
            if full:
                raise ValueError(
                    f"{source}: no section {section!r}: did you mean {full[0]!r}? (sections are "
                    f"{', '.join(sections)})"
                )
            raise ValueError(f"{source}: {nearest('section', str(section), sections)}")
        if not isinstance(part, Mapping):
            raise ValueError(f"{source}: section {section!r} needs settings, got {part!r}")
        names = [key for key in known if key.startswith(f"{section}.")]
        for name in part:
            setting, _, key = str(name).partition(".")
            if f"{section}.{setting}" not in names:
                raise ValueError(f"{source}: {nearest('setting', f'{section}.{name}', names)}")
            if key and not isinstance(known[f"{section}.{setting}"], dict):
                raise ValueError(f"{source}: {section}.{setting} is one value, and has no {key!r}")


def _by_leaf(leaf: str, known: Iterable[str]) -> list[str]:
    """Full keys whose last part looks like ``leaf``."""
    leaves = {key.partition(".")[2]: key for key in known}
    return [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1)]


def settings_yaml(settings: Settings) -> str:
    """All settings as YAML that :func:`load_settings` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def describe_settings() -> str:
    """Every setting with its default and meaning, for ``--help``."""
    lines = []
    for section in fields(Settings):
        kind = section.default_factory
        assert kind is not MISSING, f"section {section.name} has no default"
        lines.append(f"\n{section.name}: {(kind.__doc__ or '').splitlines()[0]}")
        for item in fields(kind()):
            made = item.default_factory
            default = item.default if made is MISSING else made()
            choices = item.metadata["choices"]
            allowed = f" [{', '.join(map(str, choices))}]" if choices else ""
            shown = "null" if default is None else default
            lines.append(f"  {section.name}.{item.name}={shown}")
            lines.append(f"      {item.metadata['help']}{allowed}")
    return "\n".join(lines)
