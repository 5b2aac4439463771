"""Shared by the tests of the page: a check of the data in a folder, and changes of its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from retina.check import DataCheck, check_data
from retina.config_file import load_config


def no_progress(iterable: Iterable[Any], total: int) -> Iterable[Any]:
    return iterable


def check_of(yaml: Path, root: Path, *overrides: str) -> DataCheck:
    names = [f"data.{split}_{kind}" for split in ("train", "val") for kind in ("annotations", "images")]
    paths = [f"{name}={root}/{name[5:].partition('_')[0]}" + ".json" * ("annot" in name) for name in names]
    return check_data(load_config(yaml, [*paths, *overrides]), True, no_progress)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
