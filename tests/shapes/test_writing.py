"""The folder of a generated data set: its files, its manifest, and when it is written. pycocotools reads its files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina.config import Data
from retina.config_file import ConfigError
from retina.shapes import writing
from retina.shapes.layout import CATEGORIES
from retina.shapes.outlines import CLASSES
from retina.shapes.settings import ShapesSettings
from retina.shapes.writing import make_missing_shapes, write_shapes

SETTINGS = ShapesSettings(train=40, val=3, size=128)
REPOSITORY = Path(__file__).parents[2]
SIZE = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, SETTINGS, 1)
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_any_number_of_processes_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path, SETTINGS, 2)
    written = files(tmp_path)
    assert len(written) == 40 + 3 + 2 + 2  # images, annotations, the manifest and the lock file
    assert written == files(folder)


def test_scenes_do_not_depend_on_the_number_of_images(folder: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path, ShapesSettings(train=2, val=4, size=SIZE), 1)
    few, many = files(tmp_path), files(folder)
    for name in ("train/000000.jpg", "train/000001.jpg", "val/000000.jpg", "val/000002.jpg"):
        assert few[name] == many[name]
    assert few["train/000000.jpg"] != few["val/000000.jpg"]


def test_pycocotools_gives_the_ground_truth_ap_1(folder: Path) -> None:
    coco_gt = COCO(str(folder / "annotations" / "train.json"))
    assert sorted(coco_gt.cats) != list(range(1, SETTINGS.classes + 1))
    assert [coco_gt.cats[i]["name"] for i in sorted(coco_gt.cats)] == list(CLASSES[: SETTINGS.classes])
    assert any(a["iscrowd"] for a in coco_gt.anns.values())
    for image in coco_gt.imgs.values():
        pixels = cv2.imread(str(folder / "train" / image["file_name"]))
        assert pixels is not None
        assert pixels.shape == (image["height"], image["width"], 3)
    objects = [a for a in coco_gt.anns.values() if not a["iscrowd"]]
    coco_dt = coco_gt.loadRes(
        [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in objects]
    )
    coco_eval = COCOeval(coco_gt, coco_dt, "bbox")
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    assert coco_eval.stats[0] == pytest.approx(1.0)


def test_a_complete_folder_is_unchanged_and_other_settings_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not write_shapes(folder, SETTINGS)
    assert not capsys.readouterr().out
    with pytest.raises(
        FileExistsError, match=r"val is 3, requested 4; seed is 0, requested 1.*another folder, or delete"
    ):
        write_shapes(folder, ShapesSettings(train=40, val=4, size=SIZE, seed=1))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_folder_is_completed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"no space"):
        patched.setattr(writing.json, "dumps", fail)
        write_shapes(tmp_path, SETTINGS, 1)
    assert not list(tmp_path.glob("annotations/*.json"))
    write_shapes(tmp_path, SETTINGS, 1)
    assert files(tmp_path) == files(folder)


def test_processes_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes: given 0, expected at least 1"):
        write_shapes(tmp_path, SETTINGS, 0)
    assert not list(tmp_path.iterdir())


def test_the_manifest_identifies_settings_and_pixels(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert ShapesSettings.model_validate(manifest["settings"]) == SETTINGS
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "manifest.json").unlink()
    image = other / "train" / "000003.jpg"
    image.write_bytes(image.read_bytes() + b"0")
    write_shapes(other, SETTINGS, 1)  # complete but for the manifest, as a folder of an earlier version
    changed = json.loads((other / "manifest.json").read_text())
    assert changed["sha256"]["train"] != manifest["sha256"]["train"]
    assert changed["sha256"]["val"] == manifest["sha256"]["val"]


def test_missing_data_is_made_from_its_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("{train: 3, val: 2, size: 64}")
    root = tmp_path / "data"
    data = generated_data(file, root)
    assert make_missing_shapes(data)
    assert f"{root}: writing 3 + 2 images" in capsys.readouterr().out
    assert len(list(root.glob("train/*.jpg"))) == 3
    assert not make_missing_shapes(data)
    assert not make_missing_shapes(Data())
    file.write_text("{train: 4, val: 2, size: 64}")
    with pytest.raises(FileExistsError, match="train is 3, requested 4"):
        make_missing_shapes(data)
    file.write_text("{trian: 4}")
    with pytest.raises(ConfigError, match=r"settings\.yaml: trian: unknown key; known: train, val, size"):
        make_missing_shapes(data)
    file.write_text("{train: 0}")
    with pytest.raises(ConfigError, match=r"settings\.yaml: train: given 0; expected greater than or equal to 1"):
        make_missing_shapes(data)


def generated_data(settings: Path, root: Path) -> Data:
    paths = {f"{split}_annotations": str(root / f"annotations/{split}.json") for split in ("train", "val")}
    return Data(shapes=str(settings), **paths, **{f"{split}_images": str(root / split) for split in ("train", "val")})


def test_data_of_the_user_is_never_written_over(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("{train: 3, val: 2, size: 64}")
    image = tmp_path / "mine/train/000000.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"mine")
    data = generated_data(settings, tmp_path / "mine")
    with pytest.raises(FileExistsError, match=r"has a folder train or val with files in it.*data\.shapes=null"):
        make_missing_shapes(data)
    (tmp_path / "mine/annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"mine/annotations/{split}.json").write_text('{"images": []}')
    with pytest.raises(FileExistsError, match=r"train\.json was not written by this generator"):
        make_missing_shapes(data)
    for change in ({"train_annotations": "mine/coco/train.json"}, {"val_images": "elsewhere"}):
        with pytest.raises(ConfigError, match=r"for data of your own give data\.shapes=null"):
            make_missing_shapes(data.model_copy(update=change))
    assert image.read_bytes() == b"mine" and len(list(image.parent.iterdir())) == 1


@pytest.mark.slow
def test_two_processes_make_the_data_once(tmp_path: Path) -> None:
    command = [sys.executable, REPOSITORY / "tools/make_shapes.py", "--output", tmp_path / "data", "--train", "30"]
    command += ["--val", "2", "--size", "64", "--processes", "1"]
    processes = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("train: 30 of 30 images" in output for output in outputs) == 1
    assert len(list((tmp_path / "data/train").iterdir())) == 30


def test_tool_prints_class_counts_and_exits_with_2_for_other_settings(folder: Path) -> None:
    command = [sys.executable, REPOSITORY / "tools" / "make_shapes.py", "--output", folder, "--train", "40"]
    completed = subprocess.run(
        [*command, "--val", "3", "--size", str(SIZE)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    annotations = json.loads((folder / "annotations" / "train.json").read_text())["annotations"]
    circles = sum(a["category_id"] == CATEGORIES[0]["id"] and not a["iscrowd"] for a in annotations)
    assert any(line.split()[:2] == ["circle", str(circles)] for line in completed.stdout.splitlines())
    refused = subprocess.run([*command, "--val", "4"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "size is 128, requested 320" in refused.stderr
