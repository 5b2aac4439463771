"""Reads a study file: the runs that an ablation consists of, and the folder of each. Imports no torch.

    base: base/shapes.yaml                     # the config that is varied; --base takes another
    axes: {loss.gamma: [0, 2], loss.alpha: [0.25, 0.75]}      # every combination of any config keys
    seeds: [0, 1, 2]
    paper: [table1a, table1b]                  # tables of paper_tables.yaml to compare with

`cells:` instead of `axes:` lists the combinations one by one. `set:` gives keys that all cells share. `at:` holds what
differs for a base of a certain name, for example `at: {coco: {set: {model.backbone: resnet101}}}`.

A cell is one run. Its folder is named by a hash of its settings and its annotation files (and the manifest of generated
data). So equal cells of different studies share a folder and are run once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retina import __version__
from retina.config import SHAPES_MANIFEST, Config
from retina.config_file import KEYS_WITHOUT_EFFECT, load_config, override_config, read_yaml
from retina.study.cells import DEFAULT_OUTPUT, Cell, Settings, Study, StudyError
from retina.study.paper import paper_tables

DEFAULTS = Config().flat()
RESERVED = ("seed", "output_dir", "name")
SECTIONS = [name for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)]


class _Variation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    set: Settings = {}
    axes: dict[str, list[Any]] | None = None
    cells: list[Settings] | None = None
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(None, min_length=1)


class _StudyFile(_Variation):
    base: str
    paper: list[str] = []
    devices: int = Field(1, ge=1, description="processes of a cell, under torchrun where more than 1")
    milliseconds: bool = Field(False, description="time the finished detector too")
    at: dict[str, _Variation] = {}

    @model_validator(mode="after")
    def _check_axes_or_cells(self) -> Self:
        parts: list[_Variation] = [self, *self.at.values()]
        for part in parts:
            if part.axes is not None and part.cells is not None:
                raise ValueError("give axes (every combination) or cells (a list), not both")
        if self.axes is None and self.cells is None:
            raise ValueError("what varies is missing: give axes (every combination) or cells (a list)")
        return self


def load_study(
    file: str | Path,
    base: str | Path | None = None,
    overrides: Sequence[str] = (),
    output: Path = DEFAULT_OUTPUT,
) -> Study:
    """Read a study file; `base` replaces its own, `overrides` (section.key=value) come last in every cell.

    Raises StudyError or ConfigError, naming the file, the key, the value and what is accepted.
    """
    path = Path(file)
    study_file = _read_study_file(path)
    base_path = Path(base) if base is not None else path.parent / study_file.base
    at_base = study_file.at.get(base_path.stem, _Variation())
    varied = at_base if at_base.axes is not None or at_base.cells is not None else study_file
    combinations = _combinations(path, varied)
    _check_keys(path, [*combinations[0], *study_file.set, *at_base.set], list(combinations[0]), overrides)
    shared = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (study_file.set | at_base.set).items()]
    configs: list[tuple[Settings, Config]] = []
    for settings in combinations:
        flags = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
        config = load_config(base_path, [*shared, *flags], overrides_source=str(path))
        config = override_config(config, list(overrides)) if overrides else config
        flat = config.flat()
        configs.append(({key: flat[key] for key in settings}, config))
    files = {file for _, config in configs for file in _data_files(config)}
    digests = {file: _file_digest(file) for file in files}
    cells = []
    seeds = at_base.seeds or study_file.seeds or [configs[0][1].seed]
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"{path}: seeds: {seeds} names a seed twice")
    for seed in seeds:
        for settings, config in configs:
            cell_config = config.model_copy(update={"seed": seed, "name": "cell"})
            key = _cell_hash(cell_config, digests)
            cell_config = cell_config.model_copy(update={"output_dir": str(output / "cells" / key)})
            cells.append(Cell(settings, seed, cell_config, key))
    _check_distinct(path, cells)
    tables = paper_tables()
    for name in study_file.paper:
        if name not in tables:
            raise StudyError(f"{path}: paper: no table {name!r}; known: {', '.join(tables)}")
    name = f"{path.stem}-{base_path.stem}"
    return Study(
        name,
        path,
        base_path,
        tuple(overrides),
        output / name,
        cells,
        study_file.paper,
        study_file.devices,
        study_file.milliseconds,
    )


def _read_study_file(path: Path) -> _StudyFile:
    tree = read_yaml(path, "study file", "`base:`, `axes:` or `cells:`, `seeds:`", StudyError)
    try:
        return _StudyFile.model_validate(tree)
    except ValidationError as error:

        def known_keys(location: tuple[int | str, ...]) -> str:
            return ", ".join(_Variation.model_fields if location[0] == "at" else _StudyFile.model_fields)

        messages = [
            f"{path}: {'.'.join(map(str, item['loc'])) or 'study'}: "
            + (f"unknown key; known: {known_keys(item['loc'])}" if item["type"] == "extra_forbidden" else item["msg"])
            for item in error.errors()
        ]
        raise StudyError("\n".join(messages)) from None


def _combinations(path: Path, varied: _Variation) -> list[Settings]:
    if varied.cells is not None:
        if len({frozenset(settings) for settings in varied.cells}) > 1:
            raise StudyError(f"{path}: cells: all of them must set the same keys, so that they can be compared")
        combinations = [{key: settings[key] for key in varied.cells[0]} for settings in varied.cells]
    else:
        axes = varied.axes or {}
        for key, values in axes.items():
            if not values:
                raise StudyError(f"{path}: axes.{key}: an empty list; give at least one value")
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not combinations or not combinations[0]:
        raise StudyError(f"{path}: nothing varies; give axes or cells with at least one key")
    return combinations


def _check_keys(path: Path, keys: list[str], varied: list[str], overrides: Sequence[str]) -> None:
    """Raise StudyError for keys that the study sets itself, and for overrides of the keys that it varies."""
    sources = [(str(path), key) for key in keys] + [(f"argument {o!r}", o.partition("=")[0]) for o in overrides]
    for source, key in sources:
        if key in RESERVED:
            raise StudyError(
                f"{source}: {key} is not a setting of a cell: seeds are listed in `seeds:`, the folder is --output"
            )
        if key in SECTIONS:
            raise StudyError(
                f"{source}: {key} is a section; write its keys as on the command line, for example loss.gamma: 2"
            )
        if key in varied and source.startswith("argument"):
            raise StudyError(f"{source}: {path} varies {key}; change the study file, or a copy of it")


def _file_digest(path: Path) -> str:
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data_files(config: Config) -> list[Path]:
    """The files that identify the data of a run: the annotations, and the manifest of a generated data set."""
    files = [Path(config.data.train_annotations), Path(config.data.val_annotations)]
    if config.data.shapes_root is not None:
        files.append(config.data.shapes_root / SHAPES_MANIFEST)
    return files


def _cell_hash(config: Config, digests: dict[Path, str]) -> str:
    """Two runs with the same hash give the same numbers. Keys that change no number are excluded.

    Only the settings that differ from their defaults count, so that a new setting does not start every study again. A
    change of a default, or of what a setting does, needs another version of the program.
    """
    flat = {
        key: value
        for key, value in config.flat().items()
        if key not in (*KEYS_WITHOUT_EFFECT, "name") and value != DEFAULTS[key]
    }
    identity = {"settings": flat, "data": [digests[file] for file in _data_files(config)], "version": __version__}
    if config.model.weights is not None and Path(config.model.weights).is_file():
        identity["weights"] = _file_digest(Path(config.model.weights))
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_distinct(path: Path, cells: list[Cell]) -> None:
    first: dict[str, Cell] = {}
    for cell in cells:
        earlier = first.setdefault(cell.key, cell)
        if earlier is not cell:
            raise StudyError(f"{path}: two cells are the same run: {earlier.label}, and {cell.label}")
