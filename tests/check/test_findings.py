"""Every code of codes.yaml: one planted defect gives exactly that finding, with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from check_helpers import HEIGHT, WIDTH, Data, check, content, random_pixels, write_clean
from command_helpers import run_main
from image_plants import PLANTS, Plant
from PIL import Image

from retina.check.codes import CODES
from retina.check.findings import MAX_EXAMPLES


def test_every_code_has_a_plant() -> None:
    assert len(CODES) >= 40
    assert {plant.code for plant in PLANTS} == set(CODES)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.code}-{plant.change.__name__}")
def test_one_defect_gives_exactly_one_finding(data: Data, plant: Plant) -> None:
    places = plant.change(data)
    data.write()
    before = content(data.root)
    found = check(data.config()).findings
    assert [finding.code for finding in found] == [plant.code], "\n".join(map(str, found))
    assert found[0].split == plant.split
    assert found[0].count == len(places)
    assert len(found[0].examples) == min(len(places), MAX_EXAMPLES) or plant.code == "annotation-id-missing"
    named = [example.text for example in found[0].examples]
    for text in named:  # in any order: some findings begin with the worst
        assert any(place in text for place in places), text
    assert len(places) > MAX_EXAMPLES or all(any(place in text for text in named) for place in places)
    assert content(data.root) == before


def test_planted_together_each_defect_is_named(tmp_path: Path) -> None:
    data = write_clean(tmp_path / "data", 120, 60)
    together = [plant for plant in PLANTS if plant.together]
    last = ["class-in-one-split", "annotation-id-missing", "boxes-xyxy"]  # they count, or need, all boxes
    together.sort(key=lambda plant: last.index(plant.code) if plant.code in last else -1)
    assert len({plant.code for plant in together}) >= 40
    places = [plant.change(data) for plant in together]
    data.write()
    before = content(data.root)
    result = run_main("check_data.py", data.root / "config.yaml")
    assert result.returncode == 1 and result.stderr == ""
    blocks = [" ".join(block.split()) for block in result.stdout.split("\n\n")]
    for plant, named in zip(together, places, strict=True):
        heading = f"{plant.code} in {plant.split}: {CODES[plant.code].title} ("
        block = [block for block in blocks if block.partition(" ")[2].startswith(heading)]
        assert len(block) == 1, f"{heading} is not in\n{result.stdout}"
        missing = [] if len(named) > MAX_EXAMPLES else [place for place in named if place not in block[0]]
        assert not missing, block[0]
    assert content(data.root) == before


def test_boxes_at_one_place_name_their_partner(data: Data) -> None:
    image = data.train.take(empty=True)
    first, second, third, fourth = (data.train.add_object(image, [20.0, 20, 30, 30], k) for k in (3, 7, 7, 3))
    data.write()
    repeated, two_classes = check(data.config()).findings
    assert (repeated.code, two_classes.code) == ("box-repeated", "box-two-classes")
    endings = [f"annotation {third['id']}", f", as annotation {second['id']}", f"annotation {fourth['id']}"]
    endings += [f", as annotation {first['id']}"]
    assert [part in repeated.examples[i // 2].text for i, part in enumerate(endings)] == [True] * 4
    assert repeated.count == 2 and two_classes.count == 1
    assert two_classes.examples[0].text.endswith(f", dog; annotation {first['id']} is cat")
    assert two_classes.examples[0].text.startswith(f"annotation {second['id']} of image {image['id']} ")


def test_few_negative_boxes_and_equal_entries_are_warnings(tmp_path: Path) -> None:
    data = write_clean(tmp_path / "data", 60)  # 175 boxes
    image = data.train.take(min_objects=3)
    annotations = data.train.of(image)
    for annotation in annotations:
        data.train.annotations.append(annotation | {"id": annotation["id"] + 5000, "image_id": 9999})
    data.train.images.append(image | {"id": 9999})
    negative = data.train.take_object()
    negative["bbox"][2] *= -1
    data.write()
    assert {finding.code: finding.severity for finding in check(data.config()).findings} == {
        "image-listed-twice": "warning", "box-negative": "warning",
    }  # fmt: skip
    annotations[0]["bbox"][0] += 1
    for other in data.train.annotations[1:3]:
        other["bbox"] = [40, 30, -10, 12]
    data.write()
    assert {finding.code: finding.severity for finding in check(data.config()).findings} == {
        "image-listed-twice": "error", "box-negative": "error",
    }  # fmt: skip


def test_unreadable_files_are_warnings_where_the_training_skips_them(data: Data) -> None:
    data.train.path(data.train.take()).unlink()
    (finding,) = check(data.config("data.unreadable=skip")).findings
    assert (finding.code, finding.severity) == ("image-missing", "warning")


def test_files_that_are_not_used_may_be_missing(data: Data) -> None:
    data.train.path(data.train.take(empty=True)).unlink()
    assert [finding.code for finding in check(data.config()).findings] == ["image-missing"]
    assert check(data.config("data.empty_images=drop")).findings == []


def test_correct_boxes_that_begin_outside_are_not_taken_for_corners(data: Data) -> None:
    for annotation in data.val.annotations:
        annotation["bbox"] = [-12, -12, WIDTH, HEIGHT / 2]
        annotation.pop("area")
    data.write()
    assert not {f.code for f in check(data.config()).findings} & {"boxes-xyxy", "boxes-centered"}


def test_images_of_one_scene_are_no_near_duplicates(data: Data) -> None:
    """A fixed camera: the images differ by small objects and noise."""
    rng = np.random.default_rng(0)
    scene = np.asarray(random_pixels(rng)).astype(np.int64)
    for split in (data.train, data.val):
        for image in split.images:
            x, y = rng.integers(0, [WIDTH - 20, HEIGHT - 20])
            pixels = scene + rng.integers(-3, 4, scene.shape)
            pixels[y : y + 12, x : x + 12] += 40
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(split.path(image))
    assert check(data.config()).findings == []
