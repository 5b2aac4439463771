"""The images of an epoch: `data.sampling`, and the order of the batches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retina.config import Config
from retina.config_file import ConfigError, load_config
from retina.data.coco import CocoDataset
from retina.data.loader import step_keys
from retina.data.sampling import (
    class_frequencies,
    describe_sampling,
    draw_samples,
    epoch_order,
    repeat_factors,
    step_images,
)

REPEAT = ["data.sampling=repeat_factor", "data.repeat_threshold=1"]


def dataset_of(tmp_path: Path, classes_of_images: list[str]) -> CocoDataset:
    """One image for each string, one object for each letter: blue, green, red; B is a blue crowd region."""
    ids = {"b": 3, "B": 3, "g": 7, "r": 20}
    images = [{"id": 50 - i, "file_name": "x", "width": 9, "height": 9} for i in range(len(classes_of_images))]
    annotations = [
        {"image_id": image["id"], "category_id": ids[letter], "bbox": [1, 1, 5, 5], "iscrowd": int(letter == "B")}
        for image, letters in zip(images, classes_of_images, strict=True)
        for letter in letters
    ]
    tree = {
        "images": images,
        "annotations": [{"id": i, "area": 25, **annotation} for i, annotation in enumerate(annotations)],
        "categories": [{"id": 3, "name": "blue"}, {"id": 7, "name": "green"}, {"id": 20, "name": "red"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(tree))
    return CocoDataset(tmp_path / "data.json", tmp_path)


def counts_of_epochs(factors: list[float], epochs: int) -> np.ndarray:
    draws = (draw_samples(np.array(factors), 0, epoch)[0] for epoch in range(epochs))
    return np.array([np.bincount(positions, minlength=len(factors)) for positions in draws])


def test_repeat_factors_by_hand(tmp_path: Path) -> None:
    """Of 16 images 12 have red, 4 green and 1 blue objects; the threshold is 9/16."""
    images = ["rrrB", "rgg", "gb", "r", "gr", "g", "", "B", *["r"] * 8]
    data = dataset_of(tmp_path, images)
    assert [record.image_id for record in data.records] == list(range(35, 51)), "sorted by id: the reverse order"
    assert class_frequencies(data.records, 3).tolist() == [1 / 16, 4 / 16, 12 / 16]
    # red: 1, green: sqrt(9 / 4), blue: sqrt(9 / 1); the largest of an image; objects and crowd regions change nothing
    expected = [1, 1.5, 3, 1, 1.5, 1.5, 1, 1, *[1] * 8]
    np.testing.assert_allclose(repeat_factors(data.records, 3, 9 / 16)[::-1], expected, rtol=1e-12)
    subset = data.records.take(np.array([15, 13]))  # "rrrB" and "gb": all classes are in half of the images, none twice
    np.testing.assert_allclose(repeat_factors(subset, 3, 1.0), [2**0.5] * 2, rtol=1e-12)


def test_an_image_is_drawn_as_often_as_its_factor() -> None:
    factors = [1, 1.5, 2.25, 1, 1.25, 3]  # 10 in sum
    counts = counts_of_epochs(factors, 4000)
    assert (counts.sum(axis=1) == 10).all()
    assert (counts >= np.floor(factors)).all() and (counts <= np.ceil(factors)).all()
    np.testing.assert_allclose(counts.mean(axis=0), factors, atol=0.03)  # four standard deviations
    assert (counts[:, [0, 3, 5]] == [1, 1, 3]).all()
    pairs = Counter(tuple(np.flatnonzero(epoch == 2).tolist()) for epoch in counts_of_epochs([1.5] * 4, 600))
    assert len(pairs) == 6 and min(pairs.values()) > 60, "any two of the four are rounded up together, not neighbors"
    # A sum of 9.85: the epochs have 9 samples, and the rest of 0.85 is missing at a random image.
    counts = counts_of_epochs([1, 1.5, 2.25, 1, 1.1, 3], 4000)
    assert (counts.sum(axis=1) == 9).all()
    np.testing.assert_allclose(counts.mean(axis=0), np.array([1, 1.5, 2.25, 1, 1.1, 3]) - 0.85 / 6, atol=0.03)


def test_samples_are_a_function_of_seed_and_epoch() -> None:
    factors = np.tile([1, 1.4, 2.7], 30)
    drawn = {(seed, epoch): draw_samples(factors, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({positions.tobytes() for positions, _ in drawn.values()}) == 9
    for (seed, epoch), (positions, copies) in drawn.items():
        again = draw_samples(factors, seed, epoch)
        assert np.array_equal(positions, again[0]) and np.array_equal(copies, again[1]) and len(positions) == 153
        seen: Counter[int] = Counter()
        for position, copy in zip(positions.tolist(), copies.tolist(), strict=True):
            assert copy == seen[position]
            seen[position] += 1


@pytest.mark.parametrize("flags", [[], REPEAT], ids=["uniform", "repeat_factor"])
def test_steps_of_an_epoch(tiny_yaml: Path, flags: list[str]) -> None:
    config = load_config(tiny_yaml, flags)
    data = CocoDataset(config.data.train_annotations, config.data.train_images)
    samples = int(repeat_factors(data.records, 3, 1.0).sum()) if flags else 22
    assert samples == (33 if flags else 22), "22 images, more samples with repeat_factor"
    per_epoch = samples // 4
    wide = data.records.widths >= data.records.heights
    for epoch in range(6):
        batches = [step_keys(data, config, epoch * per_epoch + step) for step in range(per_epoch)]
        keys = [key for batch in batches for key in batch]
        assert {key.epoch for key in keys} == {epoch}
        assert len({(key.position, key.copy) for key in keys}) == len(keys) == samples - samples % 4
        assert sum(len({bool(wide[key.position]) for key in batch}) == 2 for batch in batches) <= 1
        if not flags:
            assert [[key.position for key in batch] for batch in batches] == epoch_order(wide, 4, config.seed, epoch)
            assert {key.copy for key in keys} == {0}
    other_order = [step_keys(data, config, step) for step in reversed(range(6 * per_epoch))]
    assert other_order[::-1] == [step_keys(data, config, step) for step in range(6 * per_epoch)]


def test_the_log_says_what_is_repeated(tmp_path: Path) -> None:
    data = dataset_of(tmp_path, ["rrrB", "rgg", "gb", "r", "gr", "g", "", "B", *["r"] * 8])

    def described(sampling: str, threshold: float) -> str:
        update = {"sampling": sampling, "repeat_threshold": threshold}
        return describe_sampling(data, Config().data.model_copy(update=update))

    assert described("uniform", 9 / 16) == ""
    assert described("repeat_factor", 9 / 16) == (  # 12 x 1 + 3 x 1.5 + 3 = 19.5
        "sampling: repeat_factor, threshold 0.5625: 19 samples per epoch instead of 16; most repeated class: blue, "
        "which is in 6.25 % of the images, 3.00 times"
    )
    assert described("repeat_factor", 0.001) == (
        "sampling: repeat_factor, threshold 0.001: no image is repeated, because the rarest class is blue, which is in "
        "6.25 % of the images; see data.repeat_threshold"
    )
    empty = dataset_of(tmp_path, ["", "B"])
    config = Config().data.model_copy(update={"sampling": "repeat_factor"})
    assert "no image is repeated, because there are no objects" in describe_sampling(empty, config)


@pytest.mark.parametrize("flag", ["data.sampling=repeat", "data.repeat_threshold=0", "data.repeat_threshold=1.5"])
def test_settings_out_of_range_are_refused(tiny_yaml: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag.split("=")[0]):
        load_config(tiny_yaml, [flag])


def test_an_epoch_omits_less_than_a_batch() -> None:
    wide = np.arange(50) % 7 != 0
    batches = epoch_order(wide, 8, 0, 3)
    flat = [i for batch in batches for i in batch]
    assert len(batches) == 6 and len(set(flat)) == 48
    assert sum(len({wide[i] for i in batch}) == 2 for batch in batches) <= 1  # at most one batch mixes orientations
    assert epoch_order(wide, 8, 0, 4) != batches and epoch_order(wide, 8, 1, 3) != batches
    seen = {i for epoch in range(12) for batch in epoch_order(wide, 8, 0, epoch) for i in batch}
    assert seen == set(range(50))
    rare = np.arange(100) < 99  # one portrait image must not be the one that is omitted in every epoch
    used = sum(99 in batch for epoch in range(100) for batch in epoch_order(rare, 16, 0, epoch))
    assert 90 <= used < 100  # 4 of 100 images are omitted
    assert epoch_order(np.array([True, False, True]), 8, 0, 0)[0].count(0) in (
        2,
        3,
    )  # fewer images than a batch: repeated


@pytest.mark.parametrize("sampling", [[], ["data.sampling=repeat_factor", "data.repeat_threshold=1"]])
def test_fewer_images_than_a_batch_are_repeated_as_further_copies(tmp_path: Path, sampling: list[str]) -> None:
    data = dataset_of(tmp_path, ["r", "r", "b"])
    config = load_config("configs/shapes.yaml", [*sampling, "train.batch_size=8"])
    for step in range(3):
        epoch, positions, copies = step_images(data, config, step)
        assert epoch == step and len(positions) == 8
        pairs = sorted(zip(positions, copies, strict=True))
        counts = Counter(positions)
        assert pairs == [(image, copy) for image in sorted(counts) for copy in range(counts[image])]
