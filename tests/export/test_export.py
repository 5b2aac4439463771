"""What tools/export.py refuses, and what it does not write."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_helpers import run_main

from retina.config import Config
from retina.evaluate import load
from retina.export import job
from retina.export.verify import Difference
from retina.model import WeightsError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["damaged.onnx", "damaged.pt2"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 no such file")
    done = run_main("eval.py", "--checkpoint", tmp_path / name)
    assert done.returncode == 1 and f"{name}: not readable as" in done.stderr, done.stderr
    with pytest.raises(WeightsError, match=r"is an exported file: retina\.export\.ExportedDetector runs it"):
        load(tmp_path / name)


def test_a_file_that_differs_is_not_written(
    trained: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_write", lambda *arguments: arguments[-1].write_text("new"))
    monkeypatch.setattr(job, "ExportedDetector", lambda path: None)
    file = tmp_path / "model.onnx"
    file.write_text("old")
    arguments = [trained[1], "--format", "onnx", "--output", file]
    monkeypatch.setattr(job, "compare_with_eager", lambda *arguments: Difference(8, 100, 0.2, 0.0, 0))
    done = run_main("export.py", *arguments)
    assert done.returncode == 1 and "boxes differ by at most 0.2000 px" in done.stderr
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(job, "compare_with_eager", lambda *arguments: Difference(8, 100, 0.05, 0.0, 0))
    assert run_main("export.py", *arguments).returncode == 0
    assert file.read_text() == "new"


def test_linked_images_are_used_and_others_are_named(
    trained: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def compare(exported: object, detector: object, samples: list[object], *_: object) -> Difference:
        used.append(len(samples))
        return Difference(8, 100, 0.0, 0.0, 0)

    monkeypatch.setattr(job, "_write", lambda *arguments: arguments[-1].write_text("new"))
    monkeypatch.setattr(job, "ExportedDetector", lambda path: None)
    monkeypatch.setattr(job, "compare_with_eager", compare)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "linked").symlink_to(trained[0].data.val_images)
    (folder / "a.jp2").touch()
    done = run_main("export.py", trained[1], "--format", "onnx", "--output", tmp_path / "m.onnx", "--images", folder)
    assert done.returncode == 0 and used == [job.SAMPLES], done.stderr
    assert "images: 1 file with other endings than" in done.stdout and ": 1 .jp2\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--format", "onnx", "--output", "model.pt2"], 2, "expected a name that ends in .onnx"),
        (["--format", "onnx", "--output", "m.onnx", "--precision", "bf16"], 2, "need --format torch"),
        (["--format", "torch", "--output", "m.pt2", "--calibrate", "."], 2, "give --size HEIGHT WIDTH"),
        (
            ["--format", "torch", "--output", "m.pt2", "--calibrate", ".", "--size", "9", "any"],
            2,
            "give --size HEIGHT W",
        ),
        (["--format", "torch", "--output", "m.pt2", "--calibrate", ".", "--precision", "bf16"], 2, "leave --precision"),
        (["--format", "torch", "--output", "m.pt2", "--batch", "0"], 2, "--batch: given 0, expected at least 1"),
        (["--format", "onnx", "--output", "m.onnx", "--size", "0", "5"], 2, "given 0, expected a number of pixels"),
        (["--format", "onnx", "--output", "m.onnx", "--images", "nowhere"], 2, "nowhere: no such folder of images"),
        (
            ["--format", "onnx", "--output", "m.onnx", "--size", "31", "41"],
            1,
            "no images to run, any number of images of 31x41",
        ),
    ],
)
def test_error_messages(trained: tuple[Config, Path], arguments: list[str], status: int, expected: str) -> None:
    done = run_main("export.py", trained[1], *arguments)
    assert done.returncode == status and expected in done.stderr, done.stderr
