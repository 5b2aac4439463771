"""The plants of plants.py that change image files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from check_helpers import HEIGHT, WIDTH, Data, Split, random_pixels
from PIL import Image
from plants import PLANTS, Plant, image_text, plant

__all__ = ["PLANTS", "Plant"]  # the list is complete when this file is imported


@plant("image-listed-twice", "train")
def listed_twice(data: Data) -> list[str]:
    image = data.train.take()
    again = image | {"id": 9999, "file_name": f"./{image['file_name']}"}
    data.train.images.append(again)
    data.train.used.add(9999)
    return image_text(again)


@plant("image-name-case", "train")
def name_in_capitals(data: Data) -> list[str]:
    first, second = data.train.take(".jpg"), data.train.take(".jpg")
    name = first["file_name"].upper()
    data.train.path(second).rename(data.train.folder / name)
    second["file_name"] = name
    return image_text(second)


@plant("image-missing", "train")
def other_case(data: Data) -> list[str]:
    image = data.train.take()
    name = image["file_name"]
    data.train.path(image).rename(data.train.folder / name.upper())
    return [f"image {image['id']} ({name}): the folder has {name.upper()}"]


@plant("image-missing", "val", together=False)
def no_folder(data: Data) -> list[str]:
    data.val.folder.rename(data.root / "elsewhere")
    return [f"{image_text(image)[0]}: there is no folder {data.val.folder}" for image in data.val.images]


def plant_image(code: str, suffix: str, detail: str, split: str = "train") -> Callable[[Any], Any]:
    """For a function that changes the file of an image: (split, image, path)."""

    def add(change: Callable[[Split, dict[str, Any]], None]) -> Callable[[Split, dict[str, Any]], None]:
        @plant(code, split)
        def planted(data: Data) -> list[str]:
            of = data.train if split == "train" else data.val
            image = of.take(suffix, empty=code == "image-size-swapped")
            change(of, image)
            return [f"{image_text(image)[0]}{detail}"]

        return change

    return add


@plant_image("image-unreadable", ".jpg", ": it is in no image format that PIL knows")
def text_file(split: Split, image: dict[str, Any]) -> None:
    split.path(image).write_text("<html>404 Not Found</html>")


@plant_image("image-unreadable", ".png", ": the file is empty")
def empty_file(split: Split, image: dict[str, Any]) -> None:
    split.path(image).write_bytes(b"")


@plant_image("image-unreadable", ".png", ": it is not a file")
def folder(split: Split, image: dict[str, Any]) -> None:
    split.path(image).unlink()
    split.path(image).mkdir()


@plant_image("image-truncated", ".jpg", ": image file is truncated", "val")
@plant_image("image-truncated", ".png", ": image file is truncated")
def truncated(split: Split, image: dict[str, Any]) -> None:
    content = split.path(image).read_bytes()
    split.path(image).write_bytes(content[: len(content) // 2])


@plant_image("image-size-differs", "", ": 130 x 96 in the JSON, 128 x 96 in the file")
def wider_in_json(split: Split, image: dict[str, Any]) -> None:
    image["width"] = 130


@plant_image("image-size-swapped", "", ": 96 x 128 in the JSON, 128 x 96 in the file")
def swapped(split: Split, image: dict[str, Any]) -> None:
    image["width"], image["height"] = HEIGHT, WIDTH


@plant_image("image-exif-rotation", ".png", ": orientation 6, 128 x 96 in the JSON, 96 x 128 in the file", "val")
@plant_image("image-exif-rotation", ".jpg", ": orientation 6, 128 x 96 in the JSON, 96 x 128 in the file")
def exif_rotated(split: Split, image: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    split.open(image).transpose(Image.Transpose.ROTATE_90).save(split.path(image), exif=exif)


@plant_image("image-cmyk", ".jpg", "")
def cmyk(split: Split, image: dict[str, Any]) -> None:
    split.open(image).convert("CMYK").save(split.path(image))


@plant_image("image-16-bit", ".png", ": mode I;16")
def bits_16(split: Split, image: dict[str, Any]) -> None:
    gray = np.asarray(split.open(image).convert("L")).astype(np.uint16) * 200
    Image.fromarray(gray).save(split.path(image))


@plant_image("image-faint", ".png", ": ")
def bits_12(split: Split, image: dict[str, Any]) -> None:
    gray = np.asarray(split.open(image).convert("L")).astype(np.uint16) * 16
    Image.fromarray(gray).save(split.path(image))


@plant_image("image-alpha", ".png", ": mode RGBA")
def alpha(split: Split, image: dict[str, Any]) -> None:
    pixels = split.open(image)
    pixels.putalpha(Image.linear_gradient("L").resize(pixels.size))
    pixels.save(split.path(image))


@plant_image("image-animated", ".png", ": 2 frames")
def animated(split: Split, image: dict[str, Any]) -> None:
    other = random_pixels(np.random.default_rng(4))
    split.open(image).save(split.path(image), "GIF", save_all=True, append_images=[other])


@plant_image("image-constant", ".png", "")
def constant(split: Split, image: dict[str, Any]) -> None:
    Image.new("RGB", (WIDTH, HEIGHT), (20, 30, 40)).save(split.path(image))


@plant("image-small", "train")
def small(data: Data) -> list[str]:
    image = data.train.add_image(random_pixels(np.random.default_rng(5), 60, 31))
    return [f"{image_text(image)[0]}: 60 x 31"]


@plant("image-elongated", "train")
def elongated(data: Data) -> list[str]:
    image = data.train.add_image(random_pixels(np.random.default_rng(6), 297, 36))
    return [f"{image_text(image)[0]}: 297 x 36"]


@plant("image-bytes-repeated", "train")
def bytes_twice(data: Data) -> list[str]:
    first, second = sorted((data.train.take(".jpg"), data.train.take(".jpg")), key=data.train.images.index)
    data.train.path(second).write_bytes(data.train.path(first).read_bytes())
    return [f"{image_text(second)[0]}: as {image_text(first)[0]}"]


@plant("image-bytes-in-both-splits", "val")
def bytes_in_both(data: Data) -> list[str]:
    train, val = data.train.take(".png"), data.val.take(".png")
    data.val.path(val).write_bytes(data.train.path(train).read_bytes())
    return [f"{image_text(val)[0]}: as {image_text(train)[0]} of the training"]


@plant("image-near-duplicate", "val")
def saved_again(data: Data) -> list[str]:
    train, val = data.train.take(".jpg"), data.val.take(".jpg")
    data.train.open(train).save(data.val.path(val), quality=70)
    return [f"{image_text(val)[0]}: like {image_text(train)[0]} of the training"]
