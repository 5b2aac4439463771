"""The pictures of the page: the sheet of training images, images with their boxes, and the charts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from coco_files import write_coco
from matplotlib.axes import Axes
from page_helpers import check_of, edit
from PIL import Image

import retina.check.pictures as pictures
from retina.check import write_page
from retina.check.findings import Example
from retina.check.pictures import draw_example, training_sheet
from retina.config_file import load_config
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches


class Drawn(NamedTuple):
    pixels: np.ndarray[Any, Any]
    boxes: np.ndarray[Any, Any]
    labels: list[str]
    dashed: list[bool]


@pytest.mark.parametrize(
    ("batch_size", "sampling"), [(4, "uniform"), (16, "uniform"), (48, "uniform"), (16, "repeat_factor")]
)
def test_sheet_shows_the_batches_of_the_training(
    tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, sampling: str
) -> None:
    """A batch of 48 repeats some of the 22 images; its first 16 are different ones, padded for all.

    repeat_factor has two copies of an image in a batch, augmented differently: both are shown.
    """
    overrides = [f"train.batch_size={batch_size}", "train.accumulate=2", "data.pad_multiple=32"]
    config = load_config(tiny_yaml, [*overrides, f"data.sampling={sampling}", "data.repeat_threshold=1"])
    dataset = CocoDataset(config.data.train_annotations, config.data.train_images)
    drawn: list[Drawn] = []

    def spy(image: Image.Image, boxes: Any, labels: list[str], *, dashed: list[bool], text_size: int) -> Image.Image:
        drawn.append(Drawn(np.asarray(image), np.asarray(boxes), labels, dashed))
        return image

    monkeypatch.setattr(pictures, "draw_boxes", spy)
    sheet = training_sheet(dataset, config)
    expected = []
    for step in train_batches(dataset, config, 0):
        for batch in step:
            images, targets = batch.images.permute(0, 2, 3, 1).numpy(), batch.targets
            expected += list(zip(batch.image_ids, images, batch.sizes, targets, strict=True))
        if len(expected) >= 16:
            break
    assert len(sheet.pictures) == len(drawn) == 16 and sheet.unreadable == []
    assert (len({sample[0] for sample in expected[:16]}) < 16) == (sampling == "repeat_factor")
    files = {record.image_id: record.path.name for record in dataset.records}
    gray = [124, 116, 104]  # 255 x the mean of ImageNet
    for picture, tile, (image_id, image, (height, width), target) in zip(sheet.pictures, drawn, expected, strict=False):
        assert picture.caption.startswith(files[image_id])
        scale = 520 / max(image.shape)
        assert tile.pixels.shape == (round(image.shape[0] * scale), round(image.shape[1] * scale), 3)
        np.testing.assert_allclose(tile.boxes, np.concatenate([target.boxes, target.ignore]) * scale)
        assert tile.labels == [dataset.names[k] for k in target.labels] + ["ignored"] * len(target.ignore)
        assert tile.dashed == [False] * len(target.boxes) + [True] * len(target.ignore)
        shown = image.copy()
        shown[height:], shown[:, width:] = gray, gray
        enlarged = Image.fromarray(shown).resize(tile.pixels.shape[1::-1], Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(enlarged, int) - tile.pixels).max() <= 1


def test_few_images_fill_the_batches(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, "train", 3, seed=1)
    write_coco(tmp_path, "val", 2, seed=2)
    check = check_of(tiny_yaml, tmp_path)
    dataset = CocoDataset(tmp_path / "train.json", tmp_path / "train")
    names = [picture.caption.partition(":")[0] for picture in training_sheet(dataset, check.config).pictures]
    assert len(names) == 16
    for start in range(0, 16, 4):  # the fourth is a further copy of one of the three
        assert set(names[start : start + 4]) == {"0000.png", "0001.png", "0002.png"}
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    counted = []

    def count(*given: Any) -> Any:
        for step in train_batches(*given):
            counted.append(step)
            yield step

    monkeypatch.setattr(pictures, "train_batches", count)
    sheet = training_sheet(dataset, check.config)
    assert sheet.pictures == [] and len(sheet.unreadable) == 3
    assert len(counted) == 16, "the 64th sample is in the 16th batch of 4"
    write_page(check, tmp_path / "page.html")
    assert "0000.png: not readable" in (tmp_path / "page.html").read_text()


def test_boxes_that_cannot_be_drawn_as_they_are(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    path = tmp_path / "image.png"
    for size in ((64, 48), (1, 1), (5000, 1), (2, 900)):
        Image.new("RGB", size, "black").save(path)
        for box in ((-inf, -inf, inf, inf), (nan, 0, nan, 5), (1e308, 1e308, inf, inf), (5, 5, 5, 5), (-9, -9, -8, -8)):
            image = draw_example(Example("", path, (box,), ("line\nbreak" * 20,), size))
            assert 400 <= max(image.size) <= 800
        assert draw_example(Example("", path, ((0, 0, 9, 9),))).mode == "RGB", "without names and size"


def test_a_margin_shows_a_box_outside(tmp_path: Path) -> None:
    """400 x 200 pixels, black. A box at x 500 to 560 needs a margin of 160; one at x 5000 gets the limit of 200."""
    path = tmp_path / "image.png"
    Image.new("RGB", (400, 200), "black").save(path)
    image = np.asarray(draw_example(Example("", path, ((500, 50, 560, 150),), ("a",), (400, 200))))
    assert image.shape == (200, 560, 3)
    assert (image[:, :395] == 0).all() and (image[10, 405:480] == 0xD8).all()
    inside, edge = image[100, 520:540], image[100, 500:504]
    assert (inside == 0xD8).all() and not (edge == 0xD8).all()
    assert draw_example(Example("", path, ((5000, 50, 5600, 150),), ("a",), (400, 200))).size == (600, 200)
    image = np.asarray(draw_example(Example("", path, ((-30, -20, 10, 10),), ("a",), (400, 200))))
    assert image.shape == (220, 430, 3)
    assert image[28, 35].any() and not image[35:, 45:].any(), "the lower side of the box is in the image"


def test_large_images_are_shrunk_and_many_boxes_have_no_names(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (4000, 1000), "black").save(path)
    boxes = tuple((40.0 * i, 100.0, 40.0 * i + 20, 140.0) for i in range(21))
    for count, has_names in ((20, True), (21, False)):
        image = draw_example(Example("", path, boxes[:count], ("name",) * count, (4000, 1000)))
        assert image.size == (800, 200)
        assert np.asarray(image)[40:].any() == has_names, "below the boxes, which end at y = 28"


@pytest.mark.parametrize("num_classes", [3, 25, 120])
def test_class_counts(
    tiny_yaml: Path, coco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_classes: int
) -> None:
    """By frequency in the training data; crowd regions do not count; a class of the other file alone comes last."""
    root = tmp_path / "data"
    shutil.copytree(coco_root, root)
    counts = {"train": [2, 5, 3], "val": [4, 0, 1]}

    def change(tree: dict[str, Any]) -> None:
        split = "val" if len(tree["images"]) == 10 else "train"
        tree["categories"] = [{"id": k, "name": f"$\\wrong{k}$"} for k in range(1, num_classes + 1)]
        tree["categories"] += [{"id": 999, "name": "only"}] if split == "val" else []
        labels = np.repeat([1, 2, 3], counts[split]).tolist() + [999] * 7 * (split == "val")
        image = tree["images"][0]["id"]
        entry = {"image_id": image, "bbox": [1, 2, 30, 30]}
        tree["annotations"] = [{"id": i, "category_id": k, **entry} for i, k in enumerate(labels, 1)]
        tree["annotations"] += [{"id": 50 + i, "category_id": 1, "iscrowd": 1, **entry} for i in range(9)]

    for split in counts:
        edit(root / f"{split}.json", change)
    bars: list[list[int]] = []
    names: list[list[str]] = []
    methods = ("barh", "set_yticks") if num_classes == 3 else ("bar", "set_xticks")
    for spied, seen in zip(methods, (bars, names), strict=True):
        original = getattr(Axes, spied)

        def spy(*given: Any, original: Any = original, seen: Any = seen, **others: Any) -> Any:
            seen.append(list(given[2]))
            return original(*given, **others)

        monkeypatch.setattr(Axes, spied, spy)
    pictures.plot_classes(check_of(tiny_yaml, root))
    others = [0] * (num_classes - 3)
    assert bars == [[5, 3, 2, *others, 0], [0, 1, 4, *others, 7]]
    assert num_classes == 120 or names[0][:3] + names[0][-1:] == ["$\\wrong2$", "$\\wrong3$", "$\\wrong1$", "only"]
