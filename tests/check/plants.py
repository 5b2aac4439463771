"""A planted defect for each code: a function that changes `Data` and returns the places that the finding must name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from check_helpers import HEIGHT, WIDTH, Data, Split, random_pixels

MAX_DETECTIONS = 40  # of the settings in check_helpers.py


class Plant(NamedTuple):
    code: str
    split: str  # that the finding has
    change: Callable[[Data], list[str]]  # returns a text for each place
    together: bool  # whether it hides no other defect of PLANTS, so that all can be in one data set


PLANTS: list[Plant] = []
Change = Callable[[Data], list[str]]


def plant(code: str, split: str, together: bool = True) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        PLANTS.append(Plant(code, split, change, together))
        return change

    return add


def image_text(image: dict[str, Any]) -> list[str]:
    return [f"image {image['id']} ({image['file_name']})"]


def box_text(annotation: dict[str, Any]) -> list[str]:
    return [f"annotation {annotation.get('id')} of image {annotation['image_id']}"]


def of_category(split: Split, category: int) -> list[dict[str, Any]]:
    return [a for a in split.annotations if a["category_id"] == category and not a["iscrowd"]]


def grid(count: int) -> list[list[float]]:
    """Boxes of 18 x 14 pixels beside each other."""
    return [[2.0 + 20 * (i % 6), 1.0 + 15 * (i // 6), 18.0, 14.0] for i in range(count)]


# Those that change many images or boxes come first, because the others add images and boxes of their own.


@plant("image-sizes-differ", "train and val", together=False)
def larger_images(data: Data) -> list[str]:
    for image in data.val.images:
        image["width"], image["height"] = 2 * image["width"], 2 * image["height"]
        data.val.open(image).resize((image["width"], image["height"])).save(data.val.path(image))
    for annotation in data.val.annotations:
        annotation["bbox"] = [2 * value for value in annotation["bbox"]]
        annotation["area"] *= 4
    return ["median side 111 pixels in train, 222 in val"]


@plant("boxes-normalized", "val", together=False)
def normalized(data: Data) -> list[str]:
    for annotation in data.val.annotations:
        annotation["bbox"] = [v / side for v, side in zip(annotation["bbox"], [WIDTH, HEIGHT] * 2, strict=True)]
    return [text for annotation in data.val.annotations for text in box_text(annotation)]


@plant("boxes-normalized", "train", together=False)
def normalized_training(data: Data) -> list[str]:
    for annotation in data.train.annotations:
        annotation["bbox"] = [v / side for v, side in zip(annotation["bbox"], [WIDTH, HEIGHT] * 2, strict=True)]
    return [text for annotation in data.train.annotations for text in box_text(annotation)]


@plant("boxes-xyxy", "val")
def corners(data: Data) -> list[str]:
    places = []
    for annotation in data.val.annotations:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
        places += box_text(annotation) * (2 * x + w > WIDTH + 1 or 2 * y + h > HEIGHT + 1)
    return places


@plant("boxes-centered", "val", together=False)
def centers(data: Data) -> list[str]:
    places = []
    for annotation in data.val.annotations:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x + w / 2, y + h / 2, w, h]
        places += box_text(annotation) * (x + 1.5 * w > WIDTH + 1 or y + 1.5 * h > HEIGHT + 1)
    return places


@plant("class-shares-differ", "train and val")
def rarer_class(data: Data) -> list[str]:
    image = data.train.add_image(random_pixels(np.random.default_rng(1)))
    fish = of_category(data.train, 21)
    for annotation, box in zip(fish, grid(len(fish)), strict=False):
        annotation.update(image_id=image["id"], bbox=box, area=252)
    for annotation in fish[MAX_DETECTIONS - 5 :]:
        data.train.annotations.remove(annotation)
    for image in data.val.images:
        data.val.add_object(image, [70.0, 40.0, 24.0, 30.0], 21)
    return ["fish: in "]


@plant("class-in-one-split", "train and val")
def class_in_training_only(data: Data) -> list[str]:
    for annotation in of_category(data.val, 20):
        data.val.annotations.remove(annotation)
    return [f"bird: {len(of_category(data.train, 20))} in train, 0 in val"]


@plant("class-rare", "train")
def rare_class(data: Data) -> list[str]:
    for annotation in of_category(data.train, 7)[9:]:
        data.train.annotations.remove(annotation)
    return ["dog: 9"]


@plant("images-without-objects", "val")
def empty_images(data: Data) -> list[str]:
    filled = len({annotation["image_id"] for annotation in data.val.annotations if not annotation["iscrowd"]})
    empty = [image for image in data.val.images if all(a["iscrowd"] for a in data.val.of(image))]
    rng = np.random.default_rng(2)
    empty += [data.val.add_image(random_pixels(rng)) for _ in range(2 * filled + 4 - len(data.val.images))]
    assert len(empty) > filled
    return [text for image in empty for text in image_text(image)]


@plant("crowd-many", "val")
def crowds(data: Data) -> list[str]:
    for annotation in data.val.annotations[::5]:
        annotation["iscrowd"] = 1
    return [text for annotation in data.val.annotations if annotation["iscrowd"] for text in box_text(annotation)]


# Categories and files


@plant("file-refused", "train", together=False)
def wrong_type(data: Data) -> list[str]:
    data.train.images[3]["width"] = "128"
    return ['images[3].width: given "128"; expected a whole number']


@plant("file-refused", "val", together=False)
def no_images(data: Data) -> list[str]:
    data.val.tree |= {"images": [], "annotations": []}
    return ["no images to use"]


@plant("categories-differ", "train and val", together=False)
def other_categories(data: Data) -> list[str]:
    data.val.tree["categories"][0]["name"] = "cow"
    return ["'cat' (id 3) only in train", "'cow' (id 3) only in val"]


def add_category(data: Data, name: str, category: int) -> None:
    for split in (data.train, data.val):
        split.tree["categories"].append({"id": category, "name": name})


@plant("category-unused", "train and val")
def unused_category(data: Data) -> list[str]:
    add_category(data, "horse", 22)
    return ["horse"]


def add_class(data: Data, name: str, category: int) -> None:
    """A category with some objects in both splits."""
    add_category(data, name, category)
    for split, count, seed in ((data.train, 10, category), (data.val, 4, 1000 + category)):
        image = split.add_image(random_pixels(np.random.default_rng(seed)))
        for x, y, w, h in grid(count):
            split.add_object(image, [WIDTH - x - w - 0.5, HEIGHT - y - h - 0.5, w, h], category)


@plant("category-name-repeated", "train and val")
def name_twice(data: Data) -> list[str]:
    add_class(data, "cat", 24)
    return ["'cat': 2 times"]


@plant("category-name-case", "train and val")
def name_in_capitals(data: Data) -> list[str]:
    add_class(data, " Dog", 25)
    return ["' Dog', 'dog'"]


@plant("category-background", "train and val")
def background(data: Data) -> list[str]:
    add_class(data, "Background", 26)
    return ["'Background'"]


@plant("category-id-gap", "train and val")
def gap(data: Data) -> list[str]:
    for split in (data.train, data.val):
        for annotation in split.annotations:
            annotation["category_id"] = {21: 9000}.get(annotation["category_id"], annotation["category_id"])
        next(c for c in split.tree["categories"] if c["id"] == 21)["id"] = 9000
    return [f"{len(data.val.tree['categories'])} categories, largest id 9000"]


@plant("annotation-id-missing", "val")
def without_id(data: Data) -> list[str]:
    for annotation in data.val.annotations[4:7]:
        del annotation["id"]
    return [f"3 of {len(data.val.annotations)} annotations"] * 3


# Boxes


@plant("annotation-id-repeated", "train")
def id_twice(data: Data) -> list[str]:
    first, second = data.train.take_object(), data.train.take_object()
    second["id"] = first["id"]
    return box_text(second)


@plant("annotation-id-zero", "train")
def id_zero(data: Data) -> list[str]:
    annotation = data.train.take_object()
    annotation["id"] = 0
    return box_text(annotation)


def plant_box(code: str, bbox: list[float], **keys: Any) -> None:
    """A defect that another box makes."""

    @plant(code, "train")
    def other_box(data: Data) -> list[str]:
        annotation = data.train.take_object()
        annotation |= {"bbox": bbox, **keys}
        annotation.pop("area") if "area" not in keys else None
        return box_text(annotation)


plant_box("box-negative", [60, 50, -20.5, 30])
plant_box("box-without-area", [60, 50, 0, 30])
plant_box("box-outside", [130, 50, 20, 20])
plant_box("box-clipped", [100, 60, 40, 34])
plant_box("box-tiny", [70.5, 50, 1.5, 20])
plant_box("area-contradicts-box", [60, 50, 20, 20], area=500)
plant_box("area-contradicts-box", [60, 50, 20, 20], area=0)


@plant("box-whole-image", "train")
def whole_images(data: Data) -> list[str]:
    places = []
    for _ in range(len(data.train.images) // 20 + 1):
        annotation = data.train.take_object()
        annotation |= {"bbox": [0, 0, WIDTH, HEIGHT]}
        annotation.pop("area")
        places += box_text(annotation)
    return places


@plant("box-repeated", "train")
def box_twice(data: Data) -> list[str]:
    first = data.train.take_object()
    second = data.train.add_object({"id": first["image_id"]}, [v + 0.001 for v in first["bbox"]], first["category_id"])
    return box_text(second)


@plant("box-two-classes", "train")
def two_classes(data: Data) -> list[str]:
    first = data.train.take_object()
    category = 3 if first["category_id"] != 3 else 20
    return box_text(data.train.add_object({"id": first["image_id"]}, first["bbox"], category))


@plant("objects-exceed-detections", "train")
def many_objects(data: Data) -> list[str]:
    image = data.train.add_image(random_pixels(np.random.default_rng(3), 2 * WIDTH, 2 * HEIGHT))
    for i in range(MAX_DETECTIONS + 1):
        data.train.add_object(image, [2.0 + 36 * (i % 7), 1.0 + 31 * (i // 7), 34.0, 29.0])
    return [f"{image_text(image)[0]}: 41 objects"]


@plant("objects-below-positive-iou", "train")
def elongated_objects(data: Data) -> list[str]:
    places = []
    for annotation in [a for a in of_category(data.train, 20) if a["bbox"][3] > 14 and a.get("area")][::2]:
        x, y, _, _ = annotation["bbox"]
        annotation |= {"bbox": [min(x, 60), y, 66, 6], "area": 300}
        places += box_text(annotation)
    return places


@plant("objects-without-anchor", "train")
def hidden_objects(data: Data) -> list[str]:
    places = []
    for number in range(4):
        image = data.train.add_image(random_pixels(np.random.default_rng(100 + number)))
        data.train.add_object(image, [58.0, 42.0, 12.0, 12.0])
        places += box_text(data.train.add_object(image, [59.5, 43.5, 9.0, 9.0]))
    return places
