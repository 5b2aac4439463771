"""A picture of ground truth and detections side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from retina.plots.boxes import draw_boxes
from retina.plots.fonts import load_font
from retina.plots.result_files import read_json
from retina.plural import plural

ReadImage = Callable[[Path, tuple[int, int]], NDArray[np.uint8]]  # RGB (H, W, 3) of a file, with width and height
TILE = 640  # longest side of an image in the picture, pixels


def plot_detections(
    annotations: Path,
    images: Path,
    detections: Path,
    output: Path,
    read_image: ReadImage,
    *,
    count: int = 8,
    score: float = 0.3,
) -> Path:
    """Write a PNG of image pairs: ground truth left, detections right; crowd boxes are dashed.

    The choice of images is the same at every call. The data set is cut into `count` chunks in its order. Each gives its
    image with the most classes; among those with equally many, the one with the most objects, counted up to six.

    Args:
        annotations: COCO annotation JSON.
        images: the folder of its `file_name`s.
        detections: COCO results JSON: a list of {image_id, category_id, bbox (xywh, pixels), score}.
        output: the file to write; its folder is created.
        read_image: reads the pixels of a file, given its (width, height) in the annotations. An image for which it
            raises ValueError is gray, and its caption says that it cannot be read.
        count: the largest number of pairs.
        score: the lowest score that is shown.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: nothing to show, or detections of images or categories that the annotations lack.
    """
    coco, results = read_json(annotations), read_json(detections)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    gt_by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    detections_by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    if not gt_by_image or count < 1:
        raise ValueError(f"nothing to show: {len(gt_by_image)} images in {annotations}, count = {count}")
    for annotation in coco["annotations"]:
        gt_by_image[annotation["image_id"]].append(annotation)
    for result in results:
        if result["image_id"] not in detections_by_image or result["category_id"] not in names:
            raise ValueError(f"{detections}: {result} is of an image or a category that {annotations} lacks")
        if result["score"] >= score:
            detections_by_image[result["image_id"]].append(result)

    def rank(image: dict[str, Any]) -> tuple[int, int]:
        objects = gt_by_image[image["id"]]
        return len({annotation["category_id"] for annotation in objects}), min(len(objects), 6)

    chunks = np.array_split(np.arange(len(coco["images"])), min(count, len(coco["images"])))
    tiles = []
    for chunk in chunks:
        image = max((coco["images"][index] for index in chunk), key=rank)
        gt, shown = gt_by_image[image["id"]], detections_by_image[image["id"]]
        path = images / image["file_name"]
        if not path.is_file():
            raise FileNotFoundError(f"no {path}, which {annotations} names: is {images} its image folder?")
        size = image["width"], image["height"]
        try:
            pixels, caption = Image.fromarray(read_image(path, size)), f"{path.name}: {plural(len(gt), 'object')}"
        except ValueError:
            pixels, caption = Image.new("RGB", size, "#dddddd"), f"{path.name} cannot be read"
        tiles.append(_tile(pixels, gt, names, caption))
        tiles.append(_tile(pixels, shown, names, f"{plural(len(shown), 'detection')}, score ≥ {score:g}"))
    output.parent.mkdir(parents=True, exist_ok=True)
    _sheet(tiles, columns=2 if len(chunks) <= 4 else 4).save(output, format="PNG")
    return output


def _tile(image: Image.Image, items: list[dict[str, Any]], names: dict[int, str], caption: str) -> Image.Image:
    """The image with the boxes of COCO annotations or results, TILE wide, under its caption."""
    scale = TILE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    boxes = np.array([item["bbox"] for item in items], dtype=float).reshape(-1, 4) * scale
    boxes[:, 2:] += boxes[:, :2]
    labels = [names[item["category_id"]] for item in items]
    scores = [item["score"] for item in items if "score" in item] or None
    image = draw_boxes(image, boxes, labels, scores, dashed=[bool(item.get("iscrowd")) for item in items])
    tile = Image.new("RGB", (TILE, image.height + 30), "white")
    tile.paste(image, ((TILE - image.width) // 2, 30))
    ImageDraw.Draw(tile).text((TILE // 2, 15), caption, fill="#333333", font=load_font(18, caption), anchor="mm")
    return tile


def _sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    """Tiles in rows; the gap within a pair is smaller than the gap between pairs."""
    pair_gap, gap = 8, 32
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    width = columns * TILE + columns // 2 * (pair_gap + gap) + gap
    sheet = Image.new("RGB", (width, sum(heights) + gap // 2 * (len(rows) + 1)), "white")
    for index, row in enumerate(rows):
        y = sum(heights[:index]) + gap // 2 * index + gap // 4
        for column, tile in enumerate(row):
            x = gap + column * TILE + column // 2 * (pair_gap + gap) + column % 2 * pair_gap
            sheet.paste(tile, (x, y))
    return sheet
