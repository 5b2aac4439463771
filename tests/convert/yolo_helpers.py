"""YOLO folders for the tests. Images have 40 x 30 pixels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from retina.convert.yolo import convert_yolo

BOX = "0 0.5 0.5 0.5 0.2"  # 20 x 6 pixels around (20, 15)
PIXELS = [10, 12, 20, 6]


def write(root: Path, **files: object) -> Path:
    """Text files, given as folder__name__suffix=text. A suffix png, jpg or bmp makes an image instead."""
    for key, content in files.items():
        *parts, suffix = key.split("__")
        path = root / ("/".join(parts) + f".{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix in ("png", "jpg", "bmp"):
            Image.new("RGB", (40, 30)).save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(str(content))
    return root


def one_image(root: Path, labels: object, data: str = "") -> tuple[dict, list[str]]:
    write(root, images__train__a__png=0, labels__train__a__txt=labels)
    write(root, data__yaml=f"train: images/train\nnames: [dog, cat]\n{data}")
    coco, notes, _ = convert_yolo(root, "train")
    return coco, notes


def boxes(coco: dict) -> list[list[float]]:
    return [[round(value, 6) for value in annotation["bbox"]] for annotation in coco["annotations"]]
