"""Paths in a folder without permission: the commands name path and reason instead of a traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from command_helpers import run_main, without_permission

from retina.command_line import with_path_errors


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("predict.py", ["LOCKED", "IMAGE"]),
        ("predict.py", ["best.pt", "LOCKED"]),
        ("predict.py", ["best.pt", "IMAGE", "--output", "LOCKED"]),
        ("predict.py", ["LOCKED.yaml", "IMAGE"]),
        ("eval.py", ["LOCKED"]),
        ("eval.py", ["CONFIG", "--checkpoint", "LOCKED"]),
        ("train.py", ["LOCKED.yaml"]),
        ("compare.py", ["LOCKED", "other"]),
        ("export.py", ["best.pt", "--format", "onnx", "--output", "OUT.onnx", "--images", "LOCKED"]),
        ("check_data.py", ["CONFIG", "data.train_annotations=LOCKED"]),
        ("plot.py", ["LOCKED.yaml"]),
        ("loss_distribution.py", ["LOCKED"]),
    ],
)
def test_a_folder_without_permission(
    tiny_yaml: Path,
    coco_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    arguments: list[str],
) -> None:
    monkeypatch.setattr(os, "stat", without_permission(os.stat, tmp_path / "locked"))
    names = {"LOCKED": tmp_path / "locked/x", "CONFIG": tiny_yaml, "IMAGE": coco_root / "val/0000.png", "OUT": tmp_path}
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    done = run_main(tool, *arguments)
    path = next(part for argument in arguments for part in argument.split("=") if "locked" in part)
    assert done.returncode != 0 and f"{path}: " in done.stderr
    if sys.version_info < (3, 13):  # later, what may not be looked at does not exist for Path
        assert (done.returncode, done.stderr) == (2, f"error: {path}: Permission denied\n")
    assert list(tmp_path.iterdir()) == []


def test_errors_without_a_path_are_mistakes_of_the_program() -> None:
    @with_path_errors
    def main() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        main()
