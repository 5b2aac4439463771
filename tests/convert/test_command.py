"""tools/convert.py: what it writes and prints, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_helpers import run_main
from PIL import Image

from retina.convert import convert_voc, convert_yolo
from retina.data.coco import CocoDataset

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """One image of 40 x 30 with two boxes; the second has no width."""
    root = tmp_path / "my yolo"
    for folder in ("images/val", "labels/val"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "images/val/a.png")
    (root / "labels/val/a.txt").write_text("0 0.5 0.5 0.5 0.2\n0 0.5 0.5 0 0.2\n")
    (root / "classes.txt").write_text("dog\n")
    return root


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    box = "<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    (root / "Annotations/a.xml").write_text(f"<annotation><object><name>dog</name>{box}</object></annotation>")
    (root / "ImageSets/Main/train.txt").write_text("a")
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/a.jpg")
    return root


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.slow
def test_the_process_writes_what_convert_voc_returns(voc: Path, tmp_path: Path) -> None:
    output = tmp_path / "new/folder/train.json"
    command = [sys.executable, REPOSITORY / "tools/convert.py", "voc", voc, "--split", "train", "--output", output]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    coco, notes, _ = convert_voc(voc, "train")
    assert json.loads(output.read_text()) == coco
    assert notes[0] in done.stdout and re.search(r"^ *dog +1$", done.stdout, re.MULTILINE)
    assert f"data.train_annotations={output} data.train_images={voc}/JPEGImages" in done.stdout
    assert [path.name for path in output.parent.iterdir()] == ["train.json"], "no temporary file remains"


def test_yolo_prints_the_settings_that_training_reads(yolo: Path, tmp_path: Path) -> None:
    output = tmp_path / "val.json"
    done = run_main("convert.py", "yolo", yolo, "--split", "val", "--output", output)
    assert (done.returncode, done.stderr) == (0, "")
    coco, notes, images = convert_yolo(yolo, "val")
    assert json.loads(output.read_text()) == coco
    assert len(notes) == 1 and notes[0] in done.stdout and re.search(r"^ *dog +1$", done.stdout, re.MULTILINE)
    assert f"data.val_annotations={output} 'data.val_images={images}'" in done.stdout, "quoted because of the space"
    (record,) = CocoDataset(output, images).records
    assert record.path == yolo / "images/val/a.png" and record.path.is_file()
    assert record.boxes.tolist() == [[10, 12, 30, 18]]  # (0.5 -+ 0.25) * 40, (0.5 -+ 0.1) * 30


def test_bad_input_gives_one_message_and_writes_nothing(voc: Path, tmp_path: Path) -> None:
    output = tmp_path / "out/train.json"
    done = run_main("convert.py", "voc", tmp_path, "--split", "train", "--output", output)
    assert done.returncode == 2 and not output.parent.exists()
    assert done.stderr.count("\n") == 1 and "convert voc: " in done.stderr and "expected Annotations/" in done.stderr
    done = run_main("convert.py", "yolo", voc, "--output", output)
    assert done.returncode == 2 and not output.parent.exists() and done.stderr.count("\n") == 1


def test_a_misspelt_category_writes_nothing(voc: Path, yolo: Path, tmp_path: Path) -> None:
    file = tmp_path / "out/train.json"
    done = run_main("convert.py", "voc", voc, "--split", "train", "--output", file, "--categories", "Dog")
    assert done.returncode == 2 and done.stdout == "" and not file.parent.exists()
    assert done.stderr.count("\n") == 1 and "no object of class 'Dog' in any file; did you mean 'dog'?" in done.stderr
    done = run_main("convert.py", "yolo", yolo, "--split", "val", "--output", file, "--categories", "Dog")
    assert done.returncode == 2 and done.stdout == "" and not file.parent.exists()
    assert "has the class names dog; leave out --categories" in done.stderr


@pytest.mark.parametrize("target", ["images/val/a.png", "labels/val/a.txt", "classes.txt", "labels", "mine.json"])
def test_a_file_that_the_command_did_not_write_is_never_replaced(yolo: Path, target: str) -> None:
    (yolo / "mine.json").write_text('{"images": [], "annotations": [], "categories": []}')
    before = contents(yolo)
    done = run_main("convert.py", "yolo", yolo, "--split", "val", "--output", yolo / target)
    assert done.returncode == 2 and f"{target} exists and is not a file that this command wrote" in done.stderr
    assert contents(yolo) == before


def test_a_file_that_the_command_wrote_is_replaced(yolo: Path, tmp_path: Path) -> None:
    for text, boxes in [("0 0.5 0.5 0.5 0.2", 1), ("", 0)]:
        (yolo / "labels/val/a.txt").write_text(text)
        done = run_main("convert.py", "yolo", yolo, "--split", "val", "--output", tmp_path / "val.json")
        assert done.returncode == 0, done.stderr
        assert len(json.loads((tmp_path / "val.json").read_text())["annotations"]) == boxes


def test_names_cannot_control_the_terminal(yolo: Path, tmp_path: Path) -> None:
    (yolo / "classes.txt").write_text("d\x1b[2Jog\n")
    done = run_main("convert.py", "yolo", yolo, "--split", "val", "--output", tmp_path / "val.json")
    assert done.returncode == 0 and r"d\x1b[2Jog" in done.stdout and "\x1b" not in done.stdout
