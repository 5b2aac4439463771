"""A study file -> cells: which trainings an ablation is made of, and where each of them lives.

    base: base/shapes.yaml                     # the training that is varied; --base takes another
    axes: {loss.gamma: [0, 2], loss.alpha: [0.25, 0.75]}      # every combination of any keys of the configuration
    seeds: [0, 1, 2]
    paper: [table1a, table1b]                  # tables of paper_tables.yaml to set the results beside

`cells:` instead of `axes:` lists the combinations one by one; `set:` gives keys that all cells share. `at:` holds what
differs where the base has a certain name, for example `at: {coco: {set: {model.backbone: resnet101}}}`.

A cell is one training. Its folder is named by a hash of its resolved configuration and of its annotation files, so
equal cells of different studies are one folder, trained once. torch is never imported here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from retina import __version__
from retina.config import KEYS_WITHOUT_EFFECT, Config
from retina.config_file import load_config
from retina.study.cells import Cell, Settings, Study, StudyError
from retina.study.paper import paper_tables

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
    def _one_of_both(self) -> Self:
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
    output: Path = Path("runs/ablations"),
) -> Study:
    """Read a study file; `base` replaces its own, `overrides` (section.key=value) come last in every cell.

    Raises StudyError or ConfigError, naming the file, the key, the value and what is accepted.
    """
    path = Path(file)
    given = _read_study_file(path)
    base_path = Path(base) if base is not None else path.parent / given.base
    here = given.at.get(base_path.stem, _Variation())
    varied = here if here.axes is not None or here.cells is not None else given
    combinations = _combinations(path, varied)
    _check_keys(path, [*combinations[0], *given.set, *here.set], list(combinations[0]), overrides)
    shared = [f"{key}={json.dumps(value)}" for key, value in (given.set | here.set).items()]
    configs: list[tuple[Settings, Config]] = []
    for settings in combinations:
        flags = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        config = load_config(base_path, [*shared, *flags], said=str(path))
        config = load_config(base_path, [*shared, *flags, *overrides]) if overrides else config
        flat = config.flat()
        configs.append(({key: flat[key] for key in settings}, config))
    annotations = {name for _, c in configs for name in (c.data.train_annotations, c.data.val_annotations)}
    digests = {name: _file_digest(Path(name)) for name in annotations}
    cells = []
    seeds = here.seeds or given.seeds or [configs[0][1].seed]
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"{path}: seeds: {seeds} names a seed twice")
    for seed in seeds:
        for settings, config in configs:
            values = config.model_copy(update={"seed": seed, "name": "cell"})
            key = _cell_hash(values, digests)
            run = values.model_copy(update={"output_dir": str(output / "cells" / key)})
            cells.append(Cell(settings, seed, run, key))
    _check_distinct(path, cells)
    tables = paper_tables()
    for name in given.paper:
        if name not in tables:
            raise StudyError(f"{path}: paper: there is no table {name!r}; known: {', '.join(tables)}")
    name = f"{path.stem}-{base_path.stem}"
    folder = output / name
    return Study(name, path, base_path, folder, cells, given.paper, given.devices, given.milliseconds)


def _read_study_file(path: Path) -> _StudyFile:
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there is {', '.join(near)}" if near else ""
        raise StudyError(f"{path}: no such study file{hint}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise StudyError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise StudyError(f"{path}: expected `base:`, `axes:` or `cells:`, `seeds:`; found {type(tree).__name__}")
    try:
        return _StudyFile.model_validate(tree)
    except ValidationError as error:

        def known(place: tuple[int | str, ...]) -> str:
            return ", ".join(_Variation.model_fields if place[0] == "at" else _StudyFile.model_fields)

        said = [
            f"{path}: {'.'.join(map(str, item['loc'])) or 'study'}: "
            + (f"unknown key; known: {known(item['loc'])}" if item["type"] == "extra_forbidden" else item["msg"])
            for item in error.errors()
        ]
        raise StudyError("\n".join(said)) from None


def _combinations(path: Path, varied: _Variation) -> list[Settings]:
    if varied.cells is not None:
        if len({frozenset(settings) for settings in varied.cells}) > 1:
            raise StudyError(f"{path}: cells: all of them must set the same keys, so that they can be compared")
        found = [{key: settings[key] for key in varied.cells[0]} for settings in varied.cells]
    else:
        axes = varied.axes or {}
        for key, values in axes.items():
            if not values:
                raise StudyError(f"{path}: axes.{key}: an empty list; give at least one value")
        found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not found or not found[0]:
        raise StudyError(f"{path}: nothing varies; give axes or cells with at least one key")
    return found


def _check_keys(path: Path, keys: list[str], varied: list[str], overrides: Sequence[str]) -> None:
    """What only the study itself may decide, and what it varies, cannot be set beside."""
    for said, key in [(str(path), key) for key in keys] + [(f"argument {o!r}", o.partition("=")[0]) for o in overrides]:
        if key in RESERVED:
            raise StudyError(
                f"{said}: {key} is not a setting of a cell: the seeds stand in `seeds:`, --output is a flag"
            )
        if key in SECTIONS:
            raise StudyError(
                f"{said}: {key} is a section; write its keys as on the command line, for example loss.gamma: 2"
            )
        if key in varied and said.startswith("argument"):
            raise StudyError(f"{said}: {path} varies {key}; change the study file, or a copy of it")


def _file_digest(path: Path) -> str:
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cell_hash(config: Config, digests: dict[str, str]) -> str:
    """Two trainings with one identity give the same numbers; what changes none is left out."""
    flat = {key: value for key, value in config.flat().items() if key not in (*KEYS_WITHOUT_EFFECT, "name")}
    annotations = [digests[config.data.train_annotations], digests[config.data.val_annotations]]
    about = {"config": flat, "annotations": annotations, "version": __version__}
    if config.model.weights is not None and Path(config.model.weights).is_file():
        about["weights"] = _file_digest(Path(config.model.weights))
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_distinct(path: Path, cells: list[Cell]) -> None:
    first: dict[str, Cell] = {}
    for cell in cells:
        twin = first.setdefault(cell.key, cell)
        if twin is not cell:
            raise StudyError(f"{path}: two cells are the same training: {twin.label}, and {cell.label}")
