"""A study and its cells: one training for each combination of settings and each seed; torch is never imported here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retina.config import KEYS_WITHOUT_EFFECT, Config
from retina.config_file import ConfigError

Settings = dict[str, Any]  # values by their keys, as on the command line: {"loss.gamma": 2.0}


class StudyError(ConfigError):
    """A study that cannot be run as it is; the message says where, what was given, and what to do."""


@dataclass(frozen=True)
class Cell:
    """One training of a study. `settings`: the keys that vary, in the study's order, as the configuration has them."""

    settings: Settings
    seed: int
    config: Config
    key: str  # 12 hexadecimal digits

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def label(self) -> str:
        return ", ".join(
            [*(f"{short_key(k)} {format_value(v)}" for k, v in self.settings.items()), f"seed {self.seed}"]
        )

    def result(self) -> dict[str, Any] | None:
        """What trainings.write_result left here once the training had ended; None before."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def failure(self) -> str | None:
        """Why the cell was given up; None where it was not."""
        path = self.folder / "failed.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None


@dataclass(frozen=True)
class Study:
    """Cells in the order in which they are trained: all combinations with the first seed, then with the next."""

    name: str  # of the file and of the base: gamma_alpha-shapes
    file: Path
    base: Path
    folder: Path  # for the ledger and the report
    cells: list[Cell]
    paper: list[str]
    devices: int
    milliseconds: bool

    @property
    def keys(self) -> list[str]:
        """What varies."""
        return list(self.cells[0].settings)

    def done(self, cell: Cell) -> bool:
        """Whether there is nothing left to do: trained, and timed where the study wants that."""
        result = cell.result()
        untimed = self.milliseconds and result is not None and result["metrics"] and result["milliseconds"] is None
        return result is not None and not untimed

    def missing_data(self) -> list[str]:
        """A sentence for each file or folder of the cells that is not there."""
        names = ("train_annotations", "train_images", "val_annotations", "val_images")
        wanted = {(name, getattr(cell.config.data, name)): None for cell in self.cells for name in names}
        return [f"data.{name}: no {path}" for name, path in wanted if not Path(path).exists()]

    def summary(self) -> dict[str, Any]:
        """What makes this study this study, in plain values: cells by key, and what they have in common."""
        shared = self.cells[0].config.flat()
        for cell in self.cells:
            flat = cell.config.flat()
            shared = {key: value for key, value in shared.items() if flat[key] == value}
        shared = {key: value for key, value in shared.items() if key not in (*KEYS_WITHOUT_EFFECT, "seed")}
        if self.milliseconds:
            shared["milliseconds"] = True
        return {"cells": {cell.key: cell.label for cell in self.cells}, "shared": shared}


def short_key(key: str) -> str:
    """`loss.gamma` -> gamma."""
    return key.rpartition(".")[2]


def format_value(value: Any) -> str:
    """A value of a configuration as a reader writes it: 0.25, none, 0.5 1 2."""
    if isinstance(value, list):
        return " ".join(format_value(entry) for entry in value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
