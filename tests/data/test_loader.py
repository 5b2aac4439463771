from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import write_coco

from retina.assign import assign
from retina.config import Config, Data
from retina.config_file import load_config
from retina.data.augment import random_short_side, resized_size, train_transform
from retina.data.batch import Batch
from retina.data.coco import CocoDataset, DataError, read_image
from retina.data.loader import eval_batches, image_batches, step_keys, train_batches
from retina.data.normalization import denormalize
from retina.model.anchors import make_anchors


def dataset(config: Config) -> CocoDataset:
    return CocoDataset(config.data.train_annotations, config.data.train_images)


def hashes(batches: list[Batch], first_step: int) -> dict[tuple[int, int, int], str]:
    """(step, place in the batch, image id) -> SHA-256 of the pixels, boxes and labels of the sample."""
    result = {}
    for step, batch in enumerate(batches, first_step):
        samples = zip(batch.images, batch.targets, batch.image_ids, strict=True)
        for place, (image, target, image_id) in enumerate(samples):
            content = (
                image.contiguous().numpy().tobytes() + target.boxes.numpy().tobytes() + target.labels.numpy().tobytes()
            )
            result[step, place, image_id] = hashlib.sha256(content).hexdigest()
    return result


def sample_hashes(config: Config, start: int, workers: int) -> dict[tuple[int, int, int], str]:
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    return hashes([batch for step in train_batches(dataset(config), config, start) for batch in step], start)


each_sampling = pytest.mark.parametrize(
    "sampling", [[], ["data.sampling=repeat_factor", "data.repeat_threshold=1"]], ids=["uniform", "repeat_factor"]
)


@each_sampling
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_samples_depend_neither_on_workers_nor_on_a_resume(tiny_yaml: Path, workers: int, sampling: list[str]) -> None:
    config = load_config(tiny_yaml, ["train.steps=12", *sampling])
    full_run = sample_hashes(config, 0, 0)
    assert sample_hashes(config, 0, workers) == full_run
    resumed = sample_hashes(config, 7, workers)
    assert resumed == {key: value for key, value in full_run.items() if key[0] >= 7} and len(resumed) == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_of_a_batch_is_used_again_when_nothing_refers_to_it(tiny_yaml: Path, workers: int) -> None:
    """Parts of batches, kept as views, keep their bits while the worker goes on in the memory of the other batches."""
    config = load_config(tiny_yaml, ["train.steps=30", f"data.workers={workers}"])
    expected = hashes([batch for step in train_batches(dataset(config), config, 0) for batch in step], 0)
    kept, addresses = [], []
    for step, (batch,) in enumerate(train_batches(dataset(config), config, 0)):
        assert hashes([batch], step).items() <= expected.items()
        addresses.append(batch.images.data_ptr())
        if step % 3 == 0:
            kept.append((batch.images[1], batch.images[1].clone()))
    assert all(torch.equal(view, copy) for view, copy in kept)
    assert len(set(addresses)) < len(addresses)


def test_augmentation_of_an_image_differs_between_epochs(tiny_yaml: Path) -> None:
    config = load_config(tiny_yaml, ["train.steps=20"])  # 22 images in batches of 4: five steps an epoch
    seen: dict[int, set[str]] = {}
    for (_, _, image_id), value in sample_hashes(config, 0, 2).items():
        seen.setdefault(image_id, set()).add(value)
    counts: dict[int, int] = {}
    for _, _, image_id in sample_hashes(config, 0, 0):
        counts[image_id] = counts.get(image_id, 0) + 1
    assert all(len(values) == counts[image_id] for image_id, values in seen.items()) and max(counts.values()) >= 3


def test_augmentation_differs_between_the_copies_of_an_image_in_an_epoch(tiny_yaml: Path) -> None:
    """Each sample is also padded for its own short side: the keys and the worker draw the same one."""
    flags = ["data.sampling=repeat_factor", "data.repeat_threshold=1", "train.steps=8"]
    config = load_config(tiny_yaml, flags)
    keys = [key for step in range(8) for key in step_keys(dataset(config), config, step)]
    assert {key.epoch for key in keys} == {0} and max(key.copy for key in keys) >= 1, "one epoch with copies"
    values = list(sample_hashes(config, 0, 0).values())
    assert len(set(values)) == len(values) == 32


def test_augmentation_differs_between_images(tiny_yaml: Path) -> None:
    config = load_config(tiny_yaml, ["data.short_side=[64]"])
    record = dataset(config).records[0]
    image = read_image(record.path)
    augmented = [train_transform(image, record._replace(image_id=i), config.data, 0, 0)[0] for i in range(20)]
    assert len({np.asarray(pixels).tobytes() for pixels in augmented}) > 10


@each_sampling
def test_processes_and_micro_batches_split_the_global_batch(tiny_yaml: Path, sampling: list[str]) -> None:
    config = load_config(tiny_yaml, ["train.steps=3", "train.accumulate=2", *sampling])
    data = dataset(config)
    one_process = [[i for b in step for i in b.image_ids] for step in train_batches(data, config, 0)]
    parts = [list(train_batches(data, config, 0, rank, 2)) for rank in range(2)]
    for step in range(3):
        together = [i for part in parts for batch in part[step] for i in batch.image_ids]
        assert (
            together
            == one_process[step]
            == [data.records[key.position].image_id for key in step_keys(data, config, step)]
        )
        padded_sizes = {tuple(batch.images.shape[2:]) for part in parts for batch in part[step]}
        assert len(padded_sizes) == 1  # both processes pad to the size that the global batch needs
        assert all(len(part[step]) == 2 and len(part[step][0].image_ids) == 1 for part in parts)


def test_boxes_move_with_the_pixels(tiny_yaml: Path) -> None:
    """The expected box comes from the pixels: objects of a class are the only bright ones in its channel."""
    config = load_config(tiny_yaml, ["data.photometric=0", "data.flip=0.5", "data.vertical_flip=0.5", "train.steps=15"])
    checked = 0
    for (batch,) in train_batches(dataset(config), config, 0):
        for image, target in zip(batch.images, batch.targets, strict=True):
            if len(target.labels) != 1:
                continue
            (box,), (label,) = target.boxes.tolist(), target.labels.tolist()
            rows, columns = np.nonzero(image[label].numpy() > 170)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(box) - edges).max() <= 1.5
            checked += 1
    assert checked > 10


# Scale, means and deviations in the order R, G, B: torchvision's reference, and detectron2's default for BGR.
PUBLISHED = {
    "imagenet": (255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe_bgr": (1, (123.675, 116.28, 103.53), (1, 1, 1)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_normalized_and_padding_is_zero(tiny_yaml: Path, name: str) -> None:
    config = load_config(tiny_yaml, [f"data.normalization={name}"])
    ((batch,), *_) = train_batches(dataset(config), config, 0)
    images = batch.normalized()
    assert batch.images.is_contiguous(memory_format=torch.channels_last) and images.shape[2] % 32 == 0
    for image, raw, (height, width) in zip(images, batch.images, batch.sizes, strict=True):
        assert not image[:, height:].any() and not image[:, :, width:].any()
        pixels = raw[:, :height, :width]
        expected = as_published(pixels.numpy(), name)
        torch.testing.assert_close(image[:, :height, :width], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(denormalize(expected, name), pixels.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_floats_of_torchvisions_resize_are_normalized_too(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    config = Config(data=Data(resize="torchvision", short_side=(30,), normalization=name))
    (batch,) = image_batches([image], config)
    expected = as_published(image.transpose(2, 0, 1), name)
    torch.testing.assert_close(batch.normalized()[0, :, :30, :40], expected, rtol=0, atol=1e-4)


def as_published(rgb: np.ndarray, name: str) -> torch.Tensor:
    scale, means, deviations = PUBLISHED[name]
    channels = [(rgb[i] / scale - means[i]) / deviations[i] for i in range(3)]
    return torch.tensor(np.stack(channels if name == "imagenet" else channels[::-1]), dtype=torch.float32)


def test_evaluation_sees_each_image_once_at_its_own_padded_size(tiny_yaml: Path) -> None:
    config = load_config(tiny_yaml, ["train.eval_batch=3"])
    data = dataset(config)
    for world in (1, 2):
        batches = [batch for rank in range(world) for batch in eval_batches(data, config, rank, world)]
        assert sorted(i for batch in batches for i in batch.image_ids) == [record.image_id for record in data.records]
        for batch in batches:
            for height, width in batch.sizes:
                assert tuple(batch.images.shape[2:]) == (-(-height // 32) * 32, -(-width // 32) * 32)


def test_resize_respects_both_limits() -> None:
    config = Config().data
    assert resized_size(480, 640, 800, config) == (800, 1067)
    assert resized_size(500, 1500, 800, config) == (444, 1333)
    for name in ("opencv_bilinear", "pillow"):  # detectron2 and mmdetection round one half up
        assert resized_size(400, 401, 200, config.model_copy(update={"resize": name})) == (200, 201)
    assert resized_size(400, 401, 200, config) == (200, 200)
    drawn = {random_short_side(config.model_copy(update={"short_side": (600, 700, 800)}), 0, e, 5) for e in range(30)}
    assert drawn == {600, 700, 800}
    config = config.model_copy(update={"short_side": (600, 700, 800)})
    assert {random_short_side(config, 0, 0, 5, copy) for copy in range(30)} == {600, 700, 800}


def test_the_short_side_of_no_image_follows_the_order_of_the_epoch() -> None:
    """NumPy takes zeros at the end of a seed for none: the seeds (s, e) and (s, e, image 0, stream 0) are one."""
    config = Data(short_side=tuple(range(600, 900)))
    with_order = [int(np.random.default_rng([7, epoch]).choice(config.short_side)) for epoch in range(20)]
    assert [random_short_side(config, 7, epoch, 0) for epoch in range(20)] != with_order


def test_unreadable_images_stop_the_run_or_are_skipped_with_a_reason(tiny_yaml: Path, tmp_path: Path) -> None:
    annotations = write_coco(tmp_path, "train", 4, seed=5)
    (tmp_path / "train/0002.png").write_bytes(b"no picture")
    flags = [f"data.train_annotations={annotations}", f"data.train_images={tmp_path}/train", "train.steps=1"]
    config = load_config(tiny_yaml, flags)
    for workers in (0, 1):
        config = load_config(tiny_yaml, [*flags, f"data.workers={workers}"])
        with pytest.raises(DataError) as caught:
            list(train_batches(dataset(config), config, 0))
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}/train/0002.png: not readable as an image"), "without a traceback"
        assert "\n" not in message and "data.unreadable=skip" in message
    config = load_config(tiny_yaml, [*flags, "data.unreadable=skip"])
    (((batch,)),) = train_batches(dataset(config), config, 0)
    assert len(batch.unreadable) == 1 and "0002.png" in next(iter(batch.unreadable.values()))
    index = batch.image_ids.index(json.loads(annotations.read_text())["images"][2]["id"])
    anchors = make_anchors(config.anchors, *batch.images.shape[2:], torch.device("cpu"))
    assigned = assign(anchors, batch.targets, batch.sizes, 3, config.assign).labels_NR
    assert (assigned[index] == -1).all()  # all its anchors are ignored, none is background
    assert (assigned[(index + 1) % 4] != -1).any()
