"""Every code of codes.yaml: one planted defect gives exactly that finding, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_helpers import Data, check, content, write_clean
from command_helpers import run_main
from image_plants import PLANTS, Plant

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
        heading = f"{CODES[plant.code].severity.upper()} {plant.code} in {plant.split}: {CODES[plant.code].title} ("
        block = [block for block in blocks if block.startswith(heading)]
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
