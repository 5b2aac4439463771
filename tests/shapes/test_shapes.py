"""The generated data set: its boxes are compared with its pixels, and pycocotools reads its files."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina.config import Data
from retina.config_file import ConfigError
from retina.shapes import layout, painting, writing
from retina.shapes.layout import CATEGORIES
from retina.shapes.outlines import CLASSES
from retina.shapes.scene import draw_scene
from retina.shapes.settings import ShapesSettings
from retina.shapes.writing import make_missing_shapes, write_shapes

SETTINGS = ShapesSettings(train=40, val=3, size=128)
REPOSITORY = Path(__file__).parents[2]
SIZE = 128


@pytest.fixture(scope="module")
def scenes() -> list[list[dict[str, Any]]]:
    """The annotations of 800 scenes, without drawing the images: the layout alone determines them."""
    annotations = []
    for index in range(800):
        items, owner = layout.random_layout(np.random.default_rng(np.random.SeedSequence([0, index])), SETTINGS)
        annotations.append([layout.annotate(item, number, owner) for number, item in enumerate(items, 1)])
    assert annotations[:20] == [draw(0, index, SIZE)[1] for index in range(20)]
    return annotations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, SETTINGS, 1)
    return root


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    return draw_scene(ShapesSettings(seed=seed, size=size), index)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_any_number_of_processes_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path, SETTINGS, 2)
    written = files(tmp_path)
    assert len(written) == 40 + 3 + 3
    assert written == files(folder)


def test_scenes_do_not_depend_on_the_number_of_images(folder: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path, ShapesSettings(train=2, val=4, size=SIZE), 1)
    few, many = files(tmp_path), files(folder)
    for name in ("train/000000.jpg", "train/000001.jpg", "val/000000.jpg", "val/000002.jpg"):
        assert few[name] == many[name]
    assert few["train/000000.jpg"] != few["val/000000.jpg"]


def test_a_scene_is_a_function_of_seed_index_and_size_only() -> None:
    threads = cv2.getNumThreads()
    image, annotations = draw(3, 5, 640)
    try:
        cv2.setNumThreads(1)
        np.random.seed(1)  # noqa: NPY002 - the global state must have no effect
        again, same = draw(3, 5, 640)
    finally:
        cv2.setNumThreads(threads)
    assert image.shape == (640, 640, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, again)
    assert annotations == same
    assert not np.array_equal(image, draw(4, 5, 640)[0])
    assert not np.array_equal(image, draw(3, 6, 640)[0])


def visible_coverage(monkeypatch: pytest.MonkeyPatch, index: int, size: int) -> list[np.ndarray]:
    """The share of each pixel that shows an annotated shape, for each of the shapes.

    It is the difference of two drawings: the shape is light in one of them, all other shapes are gray. Objects are
    painted last, so the last calls of `_choose_colors` are theirs.
    """
    original = painting._choose_colors
    calls, light_call, gray = 0, -1, 127.0

    def choose_colors(rng: np.random.Generator, background: np.ndarray, hue: float) -> np.ndarray:
        nonlocal calls
        calls += 1
        original(rng, np.zeros_like(background), hue)  # to draw the same random numbers
        return np.full((2, 3), 200.0 if calls == light_call else gray, np.float32)

    monkeypatch.setattr(painting, "_choose_colors", choose_colors)
    all_gray, annotations = draw(0, index, size)
    total_calls, masks = calls, []
    for number in range(len(annotations)):
        calls, light_call = 0, total_calls - len(annotations) + number + 1
        masks.append((draw(0, index, size)[0].astype(float) - all_gray).mean(2) / (200 - gray))
    monkeypatch.undo()
    return masks


def test_boxes_are_tight_around_the_pixels_that_show_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for index in range(25):
        masks = visible_coverage(monkeypatch, index, 192)
        for mask, annotation in zip(masks, draw(0, index, 192)[1], strict=True):
            x, y, w, h = annotation["bbox"]
            rows, columns = np.flatnonzero((mask > 0.1).any(1)), np.flatnonzero((mask > 0.1).any(0))
            pixel_box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            errors.append(np.subtract([x, y, x + w, y + h], pixel_box))
            assert annotation["area"] == pytest.approx(mask.sum(), rel=0.15, abs=6)
    assert len(errors) > 100
    assert np.abs(errors).max() < 2.5
    assert np.abs(errors).mean() < 0.5
    # A side lies inside of its last pixel, a third of a pixel on average from its edge. The four sides are alike.
    assert np.mean(errors, axis=0) == pytest.approx([0.33, 0.33, -0.33, -0.33], abs=0.12)


def test_half_of_every_annotated_shape_is_visible() -> None:
    for index in range(400):
        items, owner = layout.random_layout(np.random.default_rng([9, index]), ShapesSettings(size=128))
        for number, item in enumerate(items, 1):
            area = np.count_nonzero(item.coverage > 127)
            assert np.count_nonzero(owner == number) >= 0.5 * area > 0


def test_boxes_are_inside_the_image_and_sizes_span_the_range(scenes: list[list[dict[str, Any]]]) -> None:
    objects = [a for scene in scenes for a in scene if not a["iscrowd"]]
    boxes = np.array([a["bbox"] for a in objects])
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= SIZE
    assert boxes[:, 2:].min() > 2
    longer_sides = boxes[:, 2:].max(1)
    assert longer_sides.max() == pytest.approx(SIZE / 2, rel=0.05)
    assert longer_sides.max() <= SIZE / 2
    assert np.quantile(longer_sides, 0.02) < 11
    assert np.quantile(longer_sides, 0.9) > SIZE / 4


def test_class_frequencies_have_a_long_tail(scenes: list[list[dict[str, Any]]]) -> None:
    counts = Counter(a["category_id"] for scene in scenes for a in scene if not a["iscrowd"])
    by_class = [counts[category["id"]] for category in CATEGORIES[: SETTINGS.classes]]
    assert by_class[0] == max(by_class)
    assert 3.5 < by_class[0] / by_class[-1] < 7.5
    assert all(more > less for more, less in zip(by_class, by_class[2:], strict=False))


def test_scenes_without_objects_and_crowds_exist(scenes: list[list[dict[str, Any]]]) -> None:
    objects = np.array([sum(not a["iscrowd"] for a in scene) for scene in scenes])
    assert 0.03 < np.mean(objects == 0) < 0.08
    assert 9 < objects.mean() < 13
    assert objects.max() >= 18
    assert max(sum(a["iscrowd"] for a in scene) for scene in scenes) == 1
    assert not any(scene for scene, count in zip(scenes, objects, strict=True) if count == 0)
    crowds = [a for index in range(300) for a in draw(1, index, 320)[1] if a["iscrowd"]]
    assert 0.03 < len(crowds) / 300 < 0.08
    assert min(min(a["bbox"][2:]) for a in crowds) > 30


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
    paths = write_shapes(folder, SETTINGS)
    assert "nothing to do" in capsys.readouterr().out
    assert paths == {split: folder / "annotations" / f"{split}.json" for split in ("train", "val")}
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


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"train": 0}, "train"),
        ({"size": 63}, "size"),
        ({"seed": -1}, "seed"),
        ({"classes": 13}, "classes"),
        ({"objects": (5, 3, 9)}, "objects: expected three ascending numbers"),
        ({"object_size": (8, 20, 400)}, "the largest, 400, is above the image size 320"),
    ],
)
def test_settings_out_of_range_are_named(invalid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesSettings(**invalid)


def test_processes_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes: given 0, expected at least 1"):
        write_shapes(tmp_path, SETTINGS, 0)
    assert not list(tmp_path.iterdir())


def test_each_setting_changes_the_scenes() -> None:
    settings = ShapesSettings(
        size=256, classes=12, class_imbalance=50, objects=(2, 3, 4), object_size=(20, 40, 60), class_color=0
    )
    objects = []
    for index in range(300):
        items, owner = layout.random_layout(np.random.default_rng([4, index]), settings)
        objects += [layout.annotate(item, n, owner) for n, item in enumerate(items, 1) if not item.crowd]
    counts = Counter(a["category_id"] for a in objects)
    assert set(counts) == {category["id"] for category in CATEGORIES}
    assert 15 < counts[CATEGORIES[0]["id"]] / counts[CATEGORIES[-1]["id"]] < 150
    assert 2.3 < len(objects) / 300 < 3.1  # 5 % of the images are empty
    longer_sides = np.array([a["bbox"][2:] for a in objects]).max(1)
    assert longer_sides.max() <= 61 and np.median(longer_sides) == pytest.approx(38, abs=4)


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
    data = Data(shapes=str(file), train_annotations=str(root / "annotations/train.json"))
    assert make_missing_shapes(data)
    assert "is missing: making it as" in capsys.readouterr().out
    assert len(list(root.glob("train/*.jpg"))) == 3
    assert not make_missing_shapes(data)
    assert not make_missing_shapes(Data())
    file.write_text("{train: 4, val: 2, size: 64}")
    with pytest.raises(FileExistsError, match="train is 3, requested 4"):
        make_missing_shapes(data)
    file.write_text("{trian: 4}")
    with pytest.raises(ConfigError, match=r"settings\.yaml: trian: unknown key; known: train, val, size"):
        make_missing_shapes(data)


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
