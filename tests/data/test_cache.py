"""The cache of decoded images: equal pixels, and never those of another file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retina.config import Config
from retina.data import cache
from retina.data.cache import ImageCache
from retina.data.coco import CocoDataset, DataError, read_image
from retina.data.loader import train_batches
from retina.train.loop import train


@pytest.fixture
def dataset(coco_root: Path) -> CocoDataset:
    return CocoDataset(coco_root / "train.json", coco_root / "train")


def test_images_are_those_of_the_files(dataset: CocoDataset, tmp_path: Path) -> None:
    images = ImageCache(dataset.records, tmp_path)
    for position, record in enumerate(dataset.records):
        assert np.array_equal(images.read(position), np.asarray(Image.open(record.path)))
    images.read(0)[:] = 0  # a copy: the cache stays as it is
    assert images.read(0).any()


def test_a_second_process_decodes_nothing(
    dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ImageCache(dataset.records, tmp_path).read(3)
    monkeypatch.setattr(cache, "read_image", lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(ImageCache(dataset.records, tmp_path).read(3), expected)


def test_a_changed_file_is_read_again(coco_root: Path, tmp_path: Path) -> None:
    dataset = CocoDataset(coco_root / "train.json", coco_root / "train")
    record = dataset.records[0]._replace(path=tmp_path / "image.png")
    image = read_image(dataset.records[0].path)
    Image.fromarray(image).save(record.path)
    assert np.array_equal(ImageCache([record], tmp_path).read(0), image)
    Image.fromarray(255 - image).save(record.path)
    os.utime(record.path, ns=(1, 1))
    assert np.array_equal(ImageCache([record], tmp_path).read(0), 255 - image)


def test_an_unreadable_image_is_an_error_when_it_is_needed(dataset: CocoDataset, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = ImageCache([dataset.records[0]._replace(path=broken), dataset.records[1]], tmp_path)
    assert np.array_equal(images.read(1), read_image(dataset.records[1].path))
    with pytest.raises(DataError, match=r"broken\.png: not readable"):
        images.read(0)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(dataset: CocoDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache=.*file: cannot be written: .*; use data\.cache=null or another"):
        ImageCache(dataset.records, tmp_path / "file")


def test_a_full_disk_is_an_error_that_says_what_to_do(
    dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"data\.cache: the decoded images need .* data\.cache=null"):
        ImageCache(dataset.records, tmp_path)


@pytest.mark.slow
def test_a_run_has_equal_bits_with_and_without(tiny: Config, tmp_path: Path) -> None:
    cached = tiny.model_copy(
        update={
            "output_dir": str(tmp_path / "cached"),
            "data": tiny.data.model_copy(update={"cache": str(tmp_path / "cache"), "workers": 1}),
        }
    )
    train(tiny)
    train(cached)
    assert len(list((tmp_path / "cache").glob("*.images"))) == 2, "one for each data set"
    for name in ("metrics.csv", "eval.json", "detections.json"):
        assert (cached.run_dir / name).read_bytes() == (tiny.run_dir / name).read_bytes()
    dataset = CocoDataset(tiny.data.train_annotations, tiny.data.train_images)
    plain, from_cache = (next(train_batches(dataset, config, 0))[0] for config in (tiny, cached))
    assert plain.images.equal(from_cache.images)
