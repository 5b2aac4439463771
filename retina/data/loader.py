"""Batches whose content is a function of (seed, step): which images, how augmented, how large the padded frame.

The sampler knows every image's size from the annotations, so it fixes the frame of a whole *global* batch before any
pixel is read; each process and each micro-batch then pads to the same frame, and a batch split in two gives the same
numbers as a batch in one piece.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from retina.config import Config, Data
from retina.data.augment import MEAN, STD, eval_transform, random_short_side, resized_size, train_transform
from retina.data.coco import CocoDataset, DataError, Record, read_image


class Target(NamedTuple):
    """Ground truth of one image, in pixels of the padded frame."""

    boxes: Tensor  # float32 (M, 4) xyxy
    labels: Tensor  # int64 (M,), 0..K-1
    ignore: Tensor  # float32 (I, 4) xyxy; anchors mostly inside one of these teach nothing


class Batch(NamedTuple):
    """N images in one frame; memory is channels-last."""

    images: Tensor  # uint8 (N, 3, H, W), or float32 already normalised
    sizes: list[tuple[int, int]]  # each image's own (height, width), at the top left of the frame
    targets: list[Target]
    image_ids: list[int]
    unreadable: dict[int, str]  # image id -> what is wrong with it (data.unreadable=skip)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        targets = [Target(*(part.to(device, non_blocking=True) for part in target)) for target in self.targets]
        return self._replace(images=self.images.to(device, non_blocking=True), targets=targets)

    def normalized(self) -> Tensor:
        """float32 (N, 3, H, W) with ImageNet's mean and standard deviation, exactly zero outside of each image."""
        if self.images.is_floating_point():
            return self.images
        mean, std = _mean_and_std(self.images.device)
        images = (self.images.float() / 255 - mean) / std
        for image, (height, width) in zip(images, self.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images


IGNORE_WHOLE_IMAGE = torch.tensor([[-1e6, -1e6, 1e6, 1e6]])  # an ignore region around every anchor, however large


class SampleKey(NamedTuple):
    """What a worker needs to make a sample: which image, in which epoch, in which frame."""

    position: int  # in dataset.records
    epoch: int
    height: int
    width: int


def train_batches(
    dataset: CocoDataset, config: Config, start: int, rank: int = 0, world: int = 1
) -> Iterator[list[Batch]]:
    """For each step from `start` to the last: this process's `train.accumulate` micro-batches."""
    share = config.train.batch_size // (world * config.train.accumulate)

    def keys() -> Iterator[list[SampleKey]]:
        for step in range(start, config.train.steps):
            batch = step_keys(dataset, config, step)
            mine = batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]
            yield from (mine[i : i + share] for i in range(0, len(mine), share))

    loader = iter(_data_loader(_SampleDataset(dataset, config, train=True), keys(), config))
    for _ in range(start, config.train.steps):
        yield [next(loader) for _ in range(config.train.accumulate)]


def eval_batches(dataset: CocoDataset, config: Config, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Every image once over all processes. Only images that share a frame share a batch, so no image's detections
    depend on its neighbours."""
    by_frame: dict[tuple[int, int], list[SampleKey]] = {}
    short_side = config.data.eval_short_side or config.data.short_side[-1]
    for index, record in enumerate(dataset.records):
        frame = _padded_size([resized_size(record.height, record.width, short_side, config.data)], config.data)
        by_frame.setdefault(frame, []).append(SampleKey(index, 0, *frame))
    size = config.train.eval_batch
    batches = [keys[i : i + size] for keys in by_frame.values() for i in range(0, len(keys), size)]
    yield from _data_loader(_SampleDataset(dataset, config, train=False), batches[rank::world], config)


def step_keys(dataset: CocoDataset, config: Config, step: int) -> list[SampleKey]:
    """The samples of a global batch; a function of (seed, step) alone."""
    size = config.train.batch_size
    per_epoch = max(1, len(dataset.records) // size)
    epoch, position = divmod(step, per_epoch)
    indices = _cached_epoch_order(dataset, size, config.seed, epoch)[position]
    records = [dataset.records[i] for i in indices]
    frame = _padded_size([_train_size(record, config, epoch) for record in records], config.data)
    return [SampleKey(i, epoch, *frame) for i in indices]


@lru_cache(maxsize=2)
def _cached_epoch_order(dataset: CocoDataset, size: int, seed: int, epoch: int) -> list[list[int]]:
    return epoch_order([record.width >= record.height for record in dataset.records], size, seed, epoch)


def epoch_order(wide: Sequence[bool], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of image indices for one epoch: landscape and portrait images apart, to waste little padding.

    What is left of the two is mixed, so no orientation is rare enough never to be seen; fewer than `size` images of
    an epoch stay out, others in each. A data set smaller than `size` is repeated to fill its one batch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(wide))
    if len(order) < size:
        return [np.resize(order, size).tolist()]
    batches, rest = [], []
    for orientation in (True, False):
        group = [int(i) for i in order if wide[i] == orientation]
        whole = len(group) - len(group) % size
        batches += [group[i : i + size] for i in range(0, whole, size)]
        rest += group[whole:]
    if len(rest) >= size:
        batches.append(rest[:size])
    return [batches[i] for i in rng.permutation(len(batches))]


def _train_size(record: Record, config: Config, epoch: int) -> tuple[int, int]:
    short_side = random_short_side(config.data, config.seed, epoch, record.image_id)
    return resized_size(record.height, record.width, short_side, config.data)


def _padded_size(sizes: list[tuple[int, int]], config: Data) -> tuple[int, int]:
    multiple = config.pad_multiple
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


class _Sample(NamedTuple):
    image: NDArray[np.uint8] | Tensor
    target: Target
    key: SampleKey
    image_id: int
    unreadable: str


class _SampleDataset(Dataset[_Sample]):
    def __init__(self, dataset: CocoDataset, config: Config, train: bool) -> None:
        self.dataset, self.config, self.train = dataset, config, train

    def __getitem__(self, key: SampleKey) -> _Sample:
        record = self.dataset.records[key.position]
        nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
        try:
            image = read_image(record.path, (record.width, record.height))
        except DataError as error:
            if self.config.data.unreadable == "error":
                raise
            # In place of the picture: an empty frame that is ignored as a whole, so that nothing is learnt from it.
            blank = np.zeros((key.height, key.width, 3), dtype=np.uint8)
            return _Sample(blank, nothing._replace(ignore=IGNORE_WHOLE_IMAGE), key, record.image_id, str(error))
        if not self.train:
            return _Sample(eval_transform(image, self.config.data), nothing, key, record.image_id, "")
        picture, *target = train_transform(image, record, self.config.data, self.config.seed, key.epoch)
        return _Sample(picture, Target(*target), key, record.image_id, "")


def _data_loader(samples: _SampleDataset, batches: Iterable[list[SampleKey]], config: Config) -> DataLoader[Any]:
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=config.data.workers,
        collate_fn=_collate,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
    )


def single_image_batch(image: NDArray[np.uint8] | Tensor, config: Data) -> Batch:
    """A batch of one image, as `eval_view` gives it, without ground truth."""
    height, width = image.shape[1:] if isinstance(image, Tensor) else image.shape[:2]
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    return _collate([_Sample(image, nothing, SampleKey(0, 0, *_padded_size([(height, width)], config)), 0, "")])


def _collate(samples: list[_Sample]) -> Batch:
    height, width = samples[0].key.height, samples[0].key.width
    sizes = []
    floating = any(isinstance(sample.image, Tensor) for sample in samples)
    images = torch.zeros(len(samples), height, width, 3, dtype=torch.float32 if floating else torch.uint8)
    for frame, sample in zip(images, samples, strict=True):
        image = sample.image.permute(1, 2, 0) if isinstance(sample.image, Tensor) else torch.from_numpy(sample.image)
        frame[: image.shape[0], : image.shape[1]] = image
        sizes.append((image.shape[0], image.shape[1]))
    return Batch(
        images.permute(0, 3, 1, 2),
        sizes,
        [sample.target for sample in samples],
        [sample.image_id for sample in samples],
        {sample.image_id: sample.unreadable for sample in samples if sample.unreadable},
    )


@lru_cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


def _init_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    # Ctrl-C, torchrun and schedulers signal the whole group: the trainer finishes its step, then ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
