"""Ground truth beside detections, as one picture."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from retina.plots.boxes import _font, draw_boxes
from retina.plots.result_files import read_json

TILE = 640  # longest side of an image in plot_detections, pixels


def plot_detections(
    annotations: Path, images: Path, detections: Path, output: Path, *, count: int = 8, score: float = 0.3
) -> Path:
    """Write a PNG of image pairs: ground truth left, detections right; crowd boxes are dashed.

    The choice is the same at every call: the set is cut into `count` stretches, and each gives its image with
    the most classes, and of these the one with the most objects (beyond six, more do not count).

    Args:
        annotations: COCO annotation JSON.
        images: the folder that its `file_name`s are in.
        detections: COCO results JSON: a list of {image_id, category_id, bbox (xywh, pixels), score}.
        output: the file to write; its folder is made.
        count: pairs to show, at most.
        score: detections below it are not shown.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: nothing to show, or detections of images or categories that the annotations lack.
    """
    coco, results = read_json(annotations), read_json(detections)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    truth_of: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    found_of: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    if not truth_of or count < 1:
        raise ValueError(f"nothing to show: {len(truth_of)} images in {annotations}, count = {count}")
    for annotation in coco["annotations"]:
        truth_of[annotation["image_id"]].append(annotation)
    for result in results:
        if result["image_id"] not in found_of or result["category_id"] not in names:
            raise ValueError(f"{detections}: {result} is of an image or a category that {annotations} lacks")
        if result["score"] >= score:
            found_of[result["image_id"]].append(result)

    def rank(image: dict[str, Any]) -> tuple[int, int]:
        truth = truth_of[image["id"]]
        return len({annotation["category_id"] for annotation in truth}), min(len(truth), 6)

    stretches = np.array_split(np.arange(len(coco["images"])), min(count, len(coco["images"])))
    tiles = []
    for stretch in stretches:
        image = max((coco["images"][index] for index in stretch), key=rank)
        truth, found = truth_of[image["id"]], found_of[image["id"]]
        path = images / image["file_name"]
        if not path.is_file():
            raise FileNotFoundError(f"no {path}, which {annotations} names: is {images} its image folder?")
        with Image.open(path) as opened:
            pixels = opened.convert("RGB")
        tiles.append(_tile(pixels, truth, names, f"{path.name}: {len(truth)} objects"))
        tiles.append(_tile(pixels, found, names, f"{len(found)} detections, score ≥ {score:g}"))
    output.parent.mkdir(parents=True, exist_ok=True)
    _sheet(tiles, columns=2 if len(stretches) <= 4 else 4).save(output, format="PNG")
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
    ImageDraw.Draw(tile).text((TILE // 2, 15), caption, fill="#333333", font=_font(18), anchor="mm")
    return tile


def _sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    """Tiles in rows; the two of a pair stand closer to each other than to their neighbours."""
    near, far = 8, 32
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    width = columns * TILE + columns // 2 * (near + far) + far
    sheet = Image.new("RGB", (width, sum(heights) + far // 2 * (len(rows) + 1)), "white")
    for at, row in enumerate(rows):
        y = sum(heights[:at]) + far // 2 * at + far // 4
        for column, tile in enumerate(row):
            sheet.paste(tile, (far + column * TILE + column // 2 * (near + far) + column % 2 * near, y))
    return sheet
