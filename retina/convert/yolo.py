"""Converts a YOLO data set to a COCO dictionary.

A YOLO data set has a text file for each image, with a line for each object: `class cx cy width height`, in fractions of
the image. Decisions of the conversion:

Layouts: `data.yaml` (or the only YAML file of the folder) with `train`, `val` or `test`: a folder of images (with the
folders in it), a .txt list of images, or a list of both. They are relative to `path`, or to the folder of data.yaml if
`path` is missing or does not exist here. `../train/images`, as Roboflow writes it, is also looked for without `../`. Or
a folder without data.yaml: `images/train` with `labels/train`, `train/images` with `train/labels`, `images` with
`labels`, or labels beside the images. The labels of an image are where Ultralytics looks: the last folder `images` of
its path becomes `labels`; if nothing is there, they are beside the image.

Classes: `names` of data.yaml; or else classes.txt (or obj.names), one name a line; or else the given categories.
Category ids count from 1 in the order of the class numbers: class 0 has id 1.

Lines: with 5 columns a box. With 6 columns a box and its confidence, which is not used; a note counts them. With an odd
number of columns from 7 a polygon (also an oriented box of four corners), which becomes the smallest box around its
points. Each line counts by itself, so a file may have both. With `kpt_shape` in data.yaml a line is a box with or
without keypoints, which are not used. Keypoint files without `kpt_shape` look like polygons: add it.

Values reach from 0 to 1. A value outside by up to 0.01 comes from rounding and is clipped. One farther outside is
refused, because it is nearly always a number of pixels. A box that reaches out of the image is clipped, with a note if
by more than a pixel. A box without width or height is dropped with a note. A repeated line counts once.

An image without a label file, or with an empty one, is an image without objects, if another image has a label file. Its
size is that of the upright image (rotated by its EXIF tag), which YOLO programs train on. Only the header of an image
is read. Two images with one label file (a.jpg and a.png) are refused.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from retina.convert import checks
from retina.convert.checks import Conversion, shorten
from retina.convert.yolo_folder import DataSet, absolute, find_data_set, label_file

BOX = ("cx", "cy", "width", "height")
TOLERANCE = 0.01  # how far a value may be outside of 0 to 1


def convert_yolo(root: Path, split: str | None = None, categories: list[str] | None = None) -> Conversion:
    """Convert one split of a YOLO data set.

    Args:
        root: the folder of the data set, or its data.yaml.
        split: train, val or test of data.yaml; or the name of a folder. None: the images in `root`/images or `root`.
        categories: names of the classes 0, 1, ..., if no data.yaml or classes.txt has them.

    Returns:
        The COCO dictionary (info, images, annotations, categories), with `bbox` xywh in pixels. One line for each
        change: a box dropped or clipped, and counts of polygons, confidences, images without labels, labels without
        an image and repeated lines. And the folder that each `file_name` is relative to.

    Raises:
        FileNotFoundError: no such folder or split, no image, no label file, no class names, or a listed image is
            missing.
        ValueError: data.yaml, a label file or an image that is not readable; a line that is not as described above;
            two images with one label file; or class names that are empty, repeated or not as many as `nc`. Several
            problems are reported together: their count and the first ten.
    """
    notes: list[str] = []
    data = find_data_set(root, split, categories, notes)
    labels = [label_file(image) for image in data.images]
    labelled = Counter(label for label in labels if label.exists())
    if not labelled:
        raise FileNotFoundError(
            f"{root}: none of the {len(labels)} images has a label file; looked for {labels[0]}, for example"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    problems: list[ValueError | OSError] = []
    counts: Counter[str] = Counter()
    first_image: dict[Path, Path] = {}
    for image, label in zip(data.images, labels, strict=True):
        try:
            width, height = checks.image_size(image, upright=True)
            if labelled[label] > 1 and first_image.setdefault(label, image) != image:
                raise ValueError(
                    f"{image}: has the same label file as {first_image[label].name}: {label}; keep one image"
                )
        except ValueError as error:
            problems.append(error)
            continue
        name = image.relative_to(data.folder).as_posix()
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        for number, category, box in _read_labels(label, data, problems, counts) if labelled[label] else []:
            box = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
            description = f"{label}, line {number} ({shorten(data.names[category])})"
            if box[2] <= box[0] or box[3] <= box[1]:
                notes.append(f"dropped: {description}, box {checks.format_box(box)}: without width or height")
                continue
            clipped = checks.clip(box, width, height, description, notes, unnoted=1)
            if clipped is not None:
                checks.add_annotation(annotations, len(images), category + 1, clipped)
    checks.raise_together(problems, root)

    counts["images have no label file: used as images without objects"] = len(labels) - labelled.total()
    notes += [f"{count} {what}" for what, count in counts.items() if count]
    title = " ".join([absolute(root).name, *([] if split is None else [split])])
    coco = {
        "info": checks.info(title, "YOLO"),
        "images": images,
        "annotations": annotations,
        "categories": checks.categories_list(data.names),
    }
    return Conversion(coco, notes, data.folder)


def _read_labels(
    path: Path, data: DataSet, problems: list[ValueError | OSError], counts: Counter[str]
) -> list[tuple[int, int, list[float]]]:
    """(line number, class number, corners as fractions of the image) of each object in a label file."""
    try:
        lines = checks.read_lines(path)
    except ValueError as error:
        problems.append(error)
        return []
    objects = []
    seen = set()
    for number, line in enumerate(lines, start=1):
        columns = line.split()
        if not columns:
            continue
        try:
            category = _class_number(columns[0], data.names)
            box = _box(columns[1:], data.keypoint_columns, counts)
        except ValueError as error:
            problems.append(ValueError(f"{path}, line {number}: {error}"))
            continue
        if (category, *box) in seen:
            counts["lines repeat another line of their file: used once"] += 1
            continue
        seen.add((category, *box))
        objects.append((number, category, box))
    return objects


def _class_number(text: str, names: list[str]) -> int:
    value = checks.number(text)  # some programs write 0.0
    if value is None or value != int(value) or not 0 <= value < len(names):
        raise ValueError(
            f"class {shorten(text)}, expected a whole number from 0 to {len(names) - 1} ({len(names)} names)"
        )
    return int(value)


def _box(columns: list[str], keypoint_columns: int, counts: Counter[str]) -> list[float]:
    """The corners of a box or around a polygon, as fractions of the image."""
    if keypoint_columns and len(columns) == 4 + keypoint_columns:
        counts["lines have keypoints, which are not used"] += 1
        columns = columns[:4]
    is_polygon = not keypoint_columns and len(columns) >= 6 and len(columns) % 2 == 0
    if not is_polygon and len(columns) not in (4, 5):
        others = f"or {5 + keypoint_columns} (with keypoints)" if keypoint_columns else "or the points of a polygon"
        raise ValueError(
            f"{1 + len(columns)} columns, expected 5 (class cx cy width height), 6 (with a confidence) {others}"
        )
    values = []
    for position, text in enumerate(columns):
        name = f"column {position + 2}" if is_polygon else (*BOX, "confidence")[position]
        value = checks.number(text)
        if value is None:
            raise ValueError(f"{name} is {shorten(text)}, expected a number from 0 to 1")
        low = 0 if name in ("width", "height") else -TOLERANCE
        if not low <= value <= 1 + TOLERANCE:
            raise ValueError(
                f"{name} is {text[:20]}, expected a fraction of the image from 0 to 1; divide pixels by its width or "
                "height"
            )
        values.append(value)
    if is_polygon:
        counts["polygons became boxes"] += 1
        return [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
    counts["lines have a confidence, which is not used"] += len(values) == 5
    cx, cy, width, height = values[:4]
    return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
