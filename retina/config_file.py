"""Reads a configuration: base files, YAML file, then `section.key=value` overrides -> a checked `Config`.

A YAML file has differences from the defaults in config.py and may name a `base` file, relative to itself. OmegaConf
reads and merges, pydantic checks. This file never imports torch, so a mistyped key is reported in milliseconds.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from retina.config import Config
from retina.config_section import Section

# Settings that change the detections of given weights.
_DETECTOR_KEYS = re.compile(
    r"model\.(?!weights$|frozen_stages$).*|anchors\..*|detect\.(?!tta_scales$).*|train\.precision"
    r"|data\.(short_side|eval_short_side|max_side|resize|normalization|pad_multiple)"
)
# These keys change no number of a run, so a resumed run may change them.
KEYS_WITHOUT_EFFECT = (
    "output_dir", "data.workers", "data.cache", "data.shapes", "train.checkpoint_every", "train.keep",
)  # fmt: skip
# These keys a resumed run may change by --change, from the step on at which it resumes.
KEYS_TO_CHANGE = ("train.steps", "train.lr", "train.schedule", "train.milestones", "train.accumulate",
                  "train.eval_batch", "data.unreadable")  # fmt: skip
# Where the data are and how the run is called: a resumed run may change them if the annotations are the same.
PATHS_OF_DATA = tuple(f"data.{split}_{what}" for split in ("train", "val") for what in ("annotations", "images"))
KEYS_OF_PLACE = ("name", *PATHS_OF_DATA)


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the file or override, key, value and what is accepted."""


def load_config(file: str | Path, overrides: list[str] | None = None, overrides_source: str = "argument") -> Config:
    """Read the base files of `file`, then `file`, then the overrides; later values win.

    Args:
        file: a YAML file.
        overrides: `section.key=value` strings.
        overrides_source: where the overrides come from, for error messages: "argument" gives "argument 'train.lr=0'".

    Raises:
        ConfigError: names the file or override, the key, the value, what is accepted and the nearest known name.
        OSError: a path cannot be looked at, as in a folder without permission.
    """
    path = Path(file)
    trees = [*_read_files(path), *_read_overrides(overrides or [], overrides_source)]
    return _merge({"name": re.sub(r"[^\w.-]", "_", path.stem)}, trees, str(path))


def load_preset(name: str) -> Config:
    """A file of configs/presets, which is installed as the package retina_presets."""
    return load_config(Path(str(resources.files("retina_presets") / f"{name}.yaml")))


def override_config(config: Config, overrides: list[str]) -> Config:
    """`config` with `section.key=value` overrides. Raises ConfigError as `load_config`."""
    return _merge(config.model_dump(mode="json"), _read_overrides(overrides, "argument"), "the settings")


def changed_detector_keys(old: Config, new: Config) -> list[str]:
    """The keys of the settings that change the detections of given weights, and differ."""
    return [key for key in changed_keys(old, new) if _DETECTOR_KEYS.fullmatch(key)]


def changed_keys(old: Config, new: Config, allowed: Collection[str] = ()) -> list[str]:
    """The keys of the settings that differ, but for the `allowed` ones."""
    before, after = old.flat(), new.flat()
    return [key for key in after if before[key] != after[key] and key not in allowed]


def _merge(start: dict[str, Any], trees: list[tuple[str, dict[str, Any]]], start_name: str) -> Config:
    """`start`, then the trees with their sources; later values win."""
    merged = OmegaConf.create(start)
    origin: dict[str, str] = {}
    for source, tree in trees:
        _check_keys(tree, Config, source)
        for key in _flat_keys(tree):
            origin[key] = source
        try:
            merged.merge_with(tree)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            example = "a list is given as a whole, for example data.short_side=[800]"
            raise ConfigError(f"{source}: not usable as settings: {reason}; {example}") from None
    try:
        return Config.model_validate(OmegaConf.to_container(merged))
    except ValidationError as error:
        raise ConfigError("\n".join(_format_error(item, origin, start_name) for item in error.errors())) from None


def config_from_yaml(text: str) -> Config:
    """Read what `Config.to_yaml` wrote. Raises ConfigError if the settings do not fit this version of the program."""
    try:
        return Config.model_validate(OmegaConf.to_container(OmegaConf.create(text)))
    except (ValidationError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"settings of another version: {error}") from None


def config_from_flat(values: dict[str, Any]) -> Config:
    """The inverse of `Config.flat`; keys that are missing have their defaults."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return Config.model_validate(nested)


def _read_files(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file name, contents) from the outermost base to `path` itself."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: the base files refer to each other in a circle")
    tree = read_yaml(path, "configuration file", "`section: {key: value}`")
    base = tree.pop("base", None)
    if base is None:
        return [(str(path), tree)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: given {base!r}, expected a file name")
    base = os.path.expanduser(base)  # noqa: PTH111 - Path.expanduser raises for an unknown user
    base_file = path.parent / base
    if not base_file.is_file():
        rule = "" if Path(base).is_absolute() else f"{base} is relative to the folder of {path.name}; "
        raise ConfigError(f"{path}: base: {rule}{_why_no_file(base_file.absolute(), 'configuration file')}")
    return [*_read_files(base_file, (*seen, path.resolve())), (str(path), tree)]


def read_yaml(path: Path, kind: str, expected: str, error_type: type[ConfigError] = ConfigError) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `error_type`, which says what `kind` of file and which content is expected."""
    if not path.is_file():
        raise error_type(_why_no_file(path, kind))
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise error_type(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise error_type(f"{path}: expected {expected}, given {type(tree).__name__}")
    return tree  # type: ignore[return-value]


def _why_no_file(path: Path, kind: str) -> str:
    """The message for a path that is no file, with the files that may be meant: those in it, or those beside it."""
    if path.is_dir():
        inside = [path / "config.yaml"] if (path / "config.yaml").is_file() else sorted(path.glob("*.yaml"))
        hint = f"; give {' or '.join(map(str, inside))}" if inside else ""
        return f"{path}: a folder, expected a {kind}{hint}"
    others = sorted(map(str, path.parent.glob("*.yaml"))) if path.parent.is_dir() else []
    return f"{path}: no such {kind}" + (f"; the folder has {', '.join(others)}" if others else "")


def _read_overrides(overrides: list[str], source: str) -> list[tuple[str, dict[str, Any]]]:
    for flag in overrides:
        if "=" not in flag or flag.startswith("-"):
            raise ConfigError(f"{flag!r}: expected section.key=value, for example train.lr=0.005")
    try:
        return [(f"{source} {flag!r}", OmegaConf.to_container(OmegaConf.from_dotlist([flag]))) for flag in overrides]  # type: ignore[misc]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{' '.join(overrides)!r}: not readable as section.key=value: {error}") from None


def _check_keys(tree: dict[str, Any], section: type[BaseModel], source: str, prefix: str = "") -> None:
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        if field is None:
            known = _known_keys()
            similar = difflib.get_close_matches(f"{prefix}{key}", known, 1, 0.5) or [
                name for name in known if name.rpartition(".")[2] == key
            ]
            hint = f"; did you mean {similar[0]}?" if similar else f"; known: {', '.join(section.model_fields)}"
            raise ConfigError(f"{source}: unknown key {prefix}{key}{hint}")
        if value == "???":  # OmegaConf would skip it
            raise ConfigError(f"{source}: {prefix}{key}: given ???, expected a value")
        field_type = field.annotation
        if isinstance(field_type, type) and issubclass(field_type, Section):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{key}: expected a section with keys, given {value!r}")
            _check_keys(value, field_type, source, f"{prefix}{key}.")


def _known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        field_type = field.annotation
        is_section = isinstance(field_type, type) and issubclass(field_type, Section)
        keys += _known_keys(field_type, f"{prefix}{name}.") if is_section else [f"{prefix}{name}"]  # type: ignore[arg-type]
    return keys


def _flat_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys += _flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _format_error(error: Any, origin: dict[str, str], start_name: str) -> str:
    """One pydantic error as a message: "file or override: key: given value; what is accepted"."""
    known = _known_keys()
    parts = [part for part in error["loc"] if isinstance(part, str)]
    key = next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in known), ".".join(parts))
    # A check over several keys reports no single key: the message names the last file or override that set one of them.
    source = next((where for name, where in reversed(origin.items()) if name.startswith(key)), start_name)
    given = "" if isinstance(error["input"], (dict, BaseModel)) else f"given {error['input']!r}; "
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    message = message.replace("a valid tuple", "a list, for example [800]").replace("Tuple should", "the list should")
    hint = ""
    if error["type"] == "literal_error":
        choices = [str(choice) for choice in get_args(_type_of(key)) if isinstance(choice, str)]
        similar = difflib.get_close_matches(str(error["input"]), choices, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
    return f"{source}: {key + ': ' if key else ''}{given}{message}{hint}"


def _type_of(key: str) -> Any:
    section: Any = Config
    for part in key.split("."):
        section = section.model_fields[part].annotation
    return section
