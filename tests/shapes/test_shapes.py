"""The generated data set: its boxes are compared with its pixels."""

from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from retina.shapes import layout, painting
from retina.shapes.layout import CATEGORIES
from retina.shapes.scene import draw_scene
from retina.shapes.settings import ShapesSettings

SETTINGS = ShapesSettings(train=40, val=3, size=128)
REPOSITORY = Path(__file__).parents[2]
SIZE = 128


@pytest.fixture(scope="module")
def scenes() -> list[list[dict[str, Any]]]:
    """The annotations of 800 scenes, without drawing the images: the layout alone determines them."""
    annotations = []
    for index in range(800):
        items, owner = layout.random_layout(np.random.default_rng(np.random.SeedSequence([0, index])), SETTINGS)
        annotations.append([layout.annotate(item, number, owner) for number, item in enumerate(items, 1)])
    assert annotations[:20] == [draw(0, index, SIZE)[1] for index in range(20)]
    return annotations


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    return draw_scene(ShapesSettings(seed=seed, size=size), index)


def test_a_scene_is_a_function_of_seed_index_and_size_only() -> None:
    threads = cv2.getNumThreads()
    image, annotations = draw(3, 5, 640)
    try:
        cv2.setNumThreads(1)
        np.random.seed(1)  # noqa: NPY002 - the global state must have no effect
        again, same = draw(3, 5, 640)
    finally:
        cv2.setNumThreads(threads)
    assert image.shape == (640, 640, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, again)
    assert annotations == same
    assert not np.array_equal(image, draw(4, 5, 640)[0])
    assert not np.array_equal(image, draw(3, 6, 640)[0])


def visible_coverage(monkeypatch: pytest.MonkeyPatch, index: int, size: int) -> list[np.ndarray]:
    """The share of each pixel that shows an annotated shape, for each of the shapes.

    It is the difference of two drawings: the shape is light in one of them, all other shapes are gray. Objects are
    painted last, so the last calls of `_choose_colors` are theirs.
    """
    original = painting._choose_colors
    calls, light_call, gray = 0, -1, 127.0

    def choose_colors(rng: np.random.Generator, background: np.ndarray, hue: float) -> np.ndarray:
        nonlocal calls
        calls += 1
        original(rng, np.zeros_like(background), hue)  # to draw the same random numbers
        return np.full((2, 3), 200.0 if calls == light_call else gray, np.float32)

    monkeypatch.setattr(painting, "_choose_colors", choose_colors)
    all_gray, annotations = draw(0, index, size)
    total_calls, masks = calls, []
    for number in range(len(annotations)):
        calls, light_call = 0, total_calls - len(annotations) + number + 1
        masks.append((draw(0, index, size)[0].astype(float) - all_gray).mean(2) / (200 - gray))
    monkeypatch.undo()
    return masks


@pytest.mark.slow
def test_boxes_are_tight_around_the_pixels_that_show_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for index in range(25):
        masks = visible_coverage(monkeypatch, index, 192)
        for mask, annotation in zip(masks, draw(0, index, 192)[1], strict=True):
            x, y, w, h = annotation["bbox"]
            rows, columns = np.flatnonzero((mask > 0.1).any(1)), np.flatnonzero((mask > 0.1).any(0))
            pixel_box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            errors.append(np.subtract([x, y, x + w, y + h], pixel_box))
            assert annotation["area"] == pytest.approx(mask.sum(), rel=0.15, abs=6)
    assert len(errors) > 100
    assert np.abs(errors).max() < 2.5
    assert np.abs(errors).mean() < 0.5
    # A side lies inside of its last pixel, a third of a pixel on average from its edge. The four sides are alike.
    assert np.mean(errors, axis=0) == pytest.approx([0.33, 0.33, -0.33, -0.33], abs=0.12)


def test_half_of_every_annotated_shape_is_visible() -> None:
    for index in range(400):
        items, owner = layout.random_layout(np.random.default_rng([9, index]), ShapesSettings(size=128))
        for number, item in enumerate(items, 1):
            area = np.count_nonzero(item.coverage > 127)
            assert np.count_nonzero(owner == number) >= 0.5 * area > 0


def test_boxes_are_inside_the_image_and_sizes_span_the_range(scenes: list[list[dict[str, Any]]]) -> None:
    objects = [a for scene in scenes for a in scene if not a["iscrowd"]]
    boxes = np.array([a["bbox"] for a in objects])
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= SIZE
    assert boxes[:, 2:].min() > 2
    longer_sides = boxes[:, 2:].max(1)
    assert longer_sides.max() == pytest.approx(SIZE / 2, rel=0.05)
    assert longer_sides.max() <= SIZE / 2
    assert np.quantile(longer_sides, 0.02) < 11
    assert np.quantile(longer_sides, 0.9) > SIZE / 4


def test_class_frequencies_have_a_long_tail(scenes: list[list[dict[str, Any]]]) -> None:
    counts = Counter(a["category_id"] for scene in scenes for a in scene if not a["iscrowd"])
    by_class = [counts[category["id"]] for category in CATEGORIES[: SETTINGS.classes]]
    assert by_class[0] == max(by_class)
    assert 3.5 < by_class[0] / by_class[-1] < 7.5
    assert all(more > less for more, less in zip(by_class, by_class[2:], strict=False))


def test_scenes_without_objects_and_crowds_exist(scenes: list[list[dict[str, Any]]]) -> None:
    objects = np.array([sum(not a["iscrowd"] for a in scene) for scene in scenes])
    assert 0.03 < np.mean(objects == 0) < 0.08
    assert 9 < objects.mean() < 13
    assert objects.max() >= 18
    assert max(sum(a["iscrowd"] for a in scene) for scene in scenes) == 1
    assert not any(scene for scene, count in zip(scenes, objects, strict=True) if count == 0)
    crowds = []
    for index in range(300):
        items, owner = layout.random_layout(np.random.default_rng([1, index]), ShapesSettings(size=320))
        crowds += [layout.annotate(item, number, owner) for number, item in enumerate(items, 1) if item.crowd]
    assert 0.03 < len(crowds) / 300 < 0.08
    assert min(min(a["bbox"][2:]) for a in crowds) > 30


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"train": 0}, "train"),
        ({"size": 63}, "size"),
        ({"seed": -1}, "seed"),
        ({"classes": 13}, "classes"),
        ({"objects": (5, 3, 9)}, "objects: expected three ascending numbers"),
        ({"object_size": (8, 20, 400)}, r"object_size: expected 4 to 320, given \[8, 400\]"),
        ({"object_size": (1, 2, 3)}, r"object_size: expected 4 to 320, given \[1, 3\]"),
    ],
)
def test_settings_out_of_range_are_named(invalid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesSettings(**invalid)


def test_each_setting_changes_the_scenes() -> None:
    settings = ShapesSettings(
        size=256, classes=12, class_imbalance=50, objects=(2, 3, 4), object_size=(20, 40, 60), class_color=0
    )
    objects = []
    for index in range(300):
        items, owner = layout.random_layout(np.random.default_rng([4, index]), settings)
        objects += [layout.annotate(item, n, owner) for n, item in enumerate(items, 1) if not item.crowd]
    counts = Counter(a["category_id"] for a in objects)
    assert set(counts) == {category["id"] for category in CATEGORIES}
    assert 15 < counts[CATEGORIES[0]["id"]] / counts[CATEGORIES[-1]["id"]] < 150
    assert 2.3 < len(objects) / 300 < 3.1  # 5 % of the images are empty
    longer_sides = np.array([a["bbox"][2:] for a in objects]).max(1)
    uncolored = settings.model_copy(update={"class_color": 1})
    assert not np.array_equal(draw_scene(settings, 3)[0], draw_scene(uncolored, 3)[0])
    assert longer_sides.max() <= 61 and np.median(longer_sides) == pytest.approx(38, abs=4)


def test_settings_that_fill_the_image_can_be_drawn() -> None:
    settings = ShapesSettings(size=256, object_size=(12, 100, 224))
    for index in range(40):
        layout.random_layout(np.random.default_rng([5, index]), settings)
    largest_twice = ShapesSettings(size=128, object_size=(40, 40, 60))  # the third one has the smallest size
    for index in range(20):
        layout.random_layout(np.random.default_rng([6, index]), largest_twice)
