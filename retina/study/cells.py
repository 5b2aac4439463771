"""A study and its cells: one run for each combination of settings and each seed. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retina.config import SHAPES_MANIFEST, Config
from retina.config_file import KEYS_WITHOUT_EFFECT, PATHS_OF_DATA, ConfigError

DEFAULT_OUTPUT = Path("runs/ablations")
# The source files that can change the numbers of a run.
CODE_OF_A_RUN = (
    "*.py", "losses/*.py", "data/*.py", "model/*.py", "train/*.py", "evaluate/*.py", "analysis/scoring.py",
    "analysis/results_file.py",
)  # fmt: skip
LEDGER = "ledger.jsonl"  # in the folder of a study: its trials, where no other storage is given
Settings = dict[str, Any]  # values by their keys, as on the command line: {"loss.gamma": 2.0}


class StudyError(ConfigError):
    """A study that cannot be run. The message names the place, what was given, and what to do."""


@dataclass(frozen=True)
class Cell:
    """One run of a study. `settings`: the keys that vary, in the order of the study, with the values of the config."""

    settings: Settings
    seed: int
    config: Config
    key: str  # 12 hexadecimal digits: the hash of the config and the annotation files

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def label(self) -> str:
        return ", ".join(
            [*(f"{short_key(k)} {format_value(v)}" for k, v in self.settings.items()), f"seed {self.seed}"]
        )

    def result(self) -> dict[str, Any] | None:
        """What `outcome.write_result` wrote when the run ended; None before."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def has_other_code(self, code: str) -> bool:
        """Whether the cell was finished by code that is not known, or has another digest than `code`."""
        result = self.result()
        return result is not None and result.get("code") != code

    def failure(self) -> str | None:
        """Why the cell was given up; None if it was not."""
        path = self.folder / "failed.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None


@dataclass(frozen=True)
class Study:
    """The cells are in the order in which they are run: all combinations with the first seed, then with the next."""

    name: str  # of the file and of the base: gamma_alpha-shapes
    file: Path
    base: Path
    overrides: tuple[str, ...]  # section.key=value, as given on the command line; part of every cell's config
    folder: Path  # of the trial storage and the report
    cells: list[Cell]
    paper: list[str]  # names of the paper's tables
    devices: int  # processes of each run
    milliseconds: bool  # whether the trained detectors are timed

    @property
    def keys(self) -> list[str]:
        """The config keys that vary."""
        return list(self.cells[0].settings)

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell has ended, and is timed if the study asks for that."""
        result = cell.result()
        untimed = self.milliseconds and result is not None and result["metrics"] and result["milliseconds"] is None
        return result is not None and not untimed

    def missing_data(self) -> list[str]:
        """A message for each file or folder of the cells' data that does not exist."""
        names = [key.removeprefix("data.") for key in PATHS_OF_DATA]
        paths = {(name, getattr(cell.config.data, name)): None for cell in self.cells for name in names}
        roots = (cell.config.data.shapes_root for cell in self.cells)
        paths |= {("shapes", str(root / SHAPES_MANIFEST)): None for root in roots if root is not None}
        return [f"data.{name}: no {path}" for name, path in paths if not Path(path).exists()]

    def summary(self) -> dict[str, Any]:
        """The identity of the study in plain values: its cells by key, and the settings that all of them share."""
        shared = self.cells[0].config.flat()
        for cell in self.cells:
            flat = cell.config.flat()
            shared = {key: value for key, value in shared.items() if flat[key] == value}
        shared = {key: value for key, value in shared.items() if key not in (*KEYS_WITHOUT_EFFECT, "seed")}
        if self.milliseconds:
            shared["milliseconds"] = True
        return {"cells": {cell.key: cell.label for cell in self.cells}, "shared": shared}


def code_digest() -> str:
    """12 hexadecimal digits: the hash of the source files that can change the numbers of a run, as they are now."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    files = {path for pattern in CODE_OF_A_RUN for path in root.glob(pattern)} - {root / "hub.py"}
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def short_key(key: str) -> str:
    """`loss.gamma` -> gamma."""
    return key.rpartition(".")[2]


def format_value(value: Any) -> str:
    """A config value for a reader: 0.25, none, 0.5 1 2."""
    if isinstance(value, list):
        return " ".join(format_value(entry) for entry in value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
