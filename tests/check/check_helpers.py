"""A clean data set on disk, in which the check finds nothing, and the handle through which tests plant defects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retina.check import DataCheck, check_data
from retina.config import Config
from retina.config_file import load_config

WIDTH, HEIGHT = 128, 96
CATEGORIES = [{"id": i, "name": name} for i, name in ((3, "cat"), (7, "dog"), (20, "bird"), (21, "fish"))]
SETTINGS = """
anchors: {octave_base: 2}
model: {prior: 0.05}
detect: {max_detections: 40}
"""


def random_pixels(rng: np.random.Generator, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Soft colors with noise, so that no two images look alike."""
    soft = Image.fromarray(rng.integers(0, 200, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(np.asarray(soft) + rng.integers(0, 50, (height, width, 3), dtype=np.uint8))


class Split:
    """The JSON tree of a split, in memory until `Data.write`, and its folder of images."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.folder, self.file = name, root / name, root / f"{name}.json"
        self.tree: Any = json.loads(self.file.read_text())
        self.used: set[int] = set()  # ids of the images that `take` has given out

    @property
    def images(self) -> list[dict[str, Any]]:
        return self.tree["images"]  # type: ignore[no-any-return]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.tree["annotations"]  # type: ignore[no-any-return]

    def of(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """The annotations of an image."""
        return [annotation for annotation in self.annotations if annotation["image_id"] == image["id"]]

    def take(self, suffix: str = "", min_objects: int = 0, empty: bool = False) -> dict[str, Any]:
        """The next image that no defect has taken, and that has no crowd region."""
        for image in self.images:
            found = self.of(image)
            if (
                image["id"] not in self.used
                and image["file_name"].endswith(suffix)
                and min_objects <= len(found) <= (0 if empty else len(found))
                and not any(annotation["iscrowd"] for annotation in found)
            ):
                self.used.add(image["id"])
                return image
        raise AssertionError("no image is left")

    def take_object(self) -> dict[str, Any]:
        """The first object of the next image."""
        return self.of(self.take(min_objects=1))[0]

    def path(self, image: dict[str, Any]) -> Path:
        return self.folder / str(image["file_name"])

    def open(self, image: dict[str, Any]) -> Image.Image:
        with Image.open(self.path(image)) as file:
            return file.copy()

    def add_image(self, pixels: Image.Image) -> dict[str, Any]:
        """A new image file with its entry."""
        image_id = max(image["id"] for image in self.images) + 1
        image = {"id": image_id, "file_name": f"n{image_id}.png", "width": pixels.width, "height": pixels.height}
        pixels.save(self.path(image))
        self.images.append(image)
        self.used.add(image_id)
        return image

    def add_object(self, image: dict[str, Any], bbox: list[float], category: int = 3) -> dict[str, Any]:
        new_id = max(annotation.get("id", 0) for annotation in self.annotations) + 1
        annotation = {"id": new_id, "image_id": image["id"], "category_id": category, "bbox": bbox, "iscrowd": 0}
        self.annotations.append(annotation)
        return annotation


class Data:
    """Both splits in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train, self.val = Split(root, "train"), Split(root, "val")

    def rename_category(self, old: str, new: str) -> None:
        for split in (self.train, self.val):
            next(category for category in split.tree["categories"] if category["name"] == old)["name"] = new

    def write(self) -> None:
        for split in (self.train, self.val):
            split.file.write_text(json.dumps(split.tree))

    def config(self, *overrides: str) -> Config:
        return load_config(self.root / "config.yaml", list(overrides))


def write_clean(root: Path, train: int = 24, val: int = 12) -> Data:
    """Images of 128 x 96 pixels, JPEG and PNG in turn; every sixth has no objects, every eighth a crowd region."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    number = 0
    for name, count in (("train", train), ("val", val)):
        (root / name).mkdir()
        tree: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": CATEGORIES}
        for index in range(count):
            image_id = 100 + 7 * index
            file_name = f"{index:04}.{('jpg', 'png')[index % 2]}"
            random_pixels(rng).save(root / name / file_name)
            tree["images"].append({"id": image_id, "file_name": file_name, "width": WIDTH, "height": HEIGHT})
            for place in range(0 if index % 6 == 5 else 4 - index % 2):
                w, h = rng.uniform(20, 36, 2).round(2).tolist()
                left, top = 64 * (place % 2), 48 * (place // 2)  # a quarter of the image for each object
                x, y = (rng.uniform([left, top], [left + 64 - w, top + 48 - h])).round(2).tolist()
                category = CATEGORIES[number % len(CATEGORIES)]["id"]
                number += 1
                area = w * h * (1, 0.7)[number % 2]
                tree["annotations"].append(
                    {"id": 11 + 3 * number, "image_id": image_id, "category_id": category, "bbox": [x, y, w, h],
                     "area": area, "iscrowd": 0}
                )  # fmt: skip
            if index % 8 == 6:
                number += 1
                tree["annotations"].append(
                    {"id": 11 + 3 * number, "image_id": image_id, "category_id": 3, "bbox": [5.5, 4, 40, 30],
                     "area": 700, "iscrowd": 1}
                )  # fmt: skip
        (root / f"{name}.json").write_text(json.dumps(tree))
    paths = "\n".join(
        f"  {name}_annotations: {root}/{name}.json\n  {name}_images: {root}/{name}" for name in ("train", "val")
    )
    data = f"data:\n{paths}\n  short_side: [96]\n  max_side: 128\n"
    (root / "config.yaml").write_text(data + SETTINGS)
    return Data(root)


def no_progress(iterable: Iterable[Any], _: int) -> Iterable[Any]:
    return iterable


def check(config: Config, pixels: bool | None = None) -> DataCheck:
    return check_data(config, pixels, no_progress)


def content(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
