"""Makes the batches: which images are in each, read and augmented by worker processes.

The seed and the step determine a batch: which images (sampling.py), how they are augmented, and their padded size.

The annotations contain the size of every image, so the padded size of a *global* batch is known before any pixel is
read. Every process and every micro-batch pads to it. So a global batch gives the same numbers however it is split.

In training, a worker process resizes the images into the memory of their batch (batch_memory.py), which it shares with
the run.

Which images are not trained on or evaluated:

- The end of an epoch: fewer than `train.batch_size` images do not fill a batch. They are chosen at random in
  each epoch (`epoch_order` in sampling.py). With `data.sampling=repeat_factor` that holds for the samples of an epoch,
  among which are all images, but for at most one. No message. Evaluation omits none.
- A run with fewer steps than an epoch ends before it has used every image. No message.
- An image that `read_image` refuses (retina/data/coco.py describes when), with `data.unreadable=error`, the default:
  the DataError stops the run and names the file.
- The same with `data.unreadable=skip`: the image stays in its batch, but it is blank, has no boxes, and is one ignore
  region as a whole, so it adds nothing to the loss. `Batch.unreadable` has the reason. The terminal of process 0
  shows "skipped" for each such image that its own batches contain; no file keeps it. Evaluation prints "not evaluated"
  and measures the other images.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from retina.config import Config, Data
from retina.data.annotations import DataError
from retina.data.augment import eval_transform, random_short_side, resized_size, train_transform
from retina.data.batch import Batch, Target
from retina.data.batch_memory import BatchMemory, Slot
from retina.data.cache import ImageCache
from retina.data.coco import CocoDataset, read_image
from retina.data.sampling import step_images

IGNORE_WHOLE_IMAGE = torch.tensor([[-1e6, -1e6, 1e6, 1e6]])  # larger than any anchor


class SampleKey(NamedTuple):
    """What a worker needs to make a sample: the image, the epoch, the padded size in pixels, and which copy it is."""

    position: int  # in dataset.records
    epoch: int
    height: int
    width: int
    copy: int = 0  # an epoch may have more of the same image, see sampling.py: 1, 2, ...


def train_batches(
    dataset: CocoDataset, config: Config, start: int, rank: int = 0, world: int = 1
) -> Iterator[list[Batch]]:
    """For each step from `start` to the last: the `train.accumulate` micro-batches of process `rank` of `world`.

    Raises:
        DataError: an image cannot be read, with `data.unreadable=error`.
    """
    micro_batch_size = config.train.batch_size // (world * config.train.accumulate)

    def keys() -> Iterator[list[SampleKey]]:
        for step in range(start, config.train.steps):
            batch = step_keys(dataset, config, step)
            own = batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]
            yield from (own[i : i + micro_batch_size] for i in range(0, len(own), micro_batch_size))

    loader = _load(_BatchDataset(dataset, config, train=True), keys(), config)
    for _ in range(start, config.train.steps):
        yield [next(loader) for _ in range(config.train.accumulate)]


def eval_batches(dataset: CocoDataset, config: Config, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """The batches of process `rank` of `world`; together the processes see every image once. `targets` are empty.

    All images of a batch have the same padded size, so the detections on an image do not depend on the other images.

    Raises:
        DataError: an image cannot be read, with `data.unreadable=error`.
    """
    by_padded_size: dict[tuple[int, int], list[SampleKey]] = {}
    short_side = config.data.eval_short_side or config.data.short_side[-1]
    for index, (height, width) in enumerate(zip(dataset.records.heights, dataset.records.widths, strict=True)):
        padded_size = _padded_size([resized_size(int(height), int(width), short_side, config.data)], config.data)
        by_padded_size.setdefault(padded_size, []).append(SampleKey(index, 0, *padded_size))
    size = config.train.eval_batch
    batches = [keys[i : i + size] for keys in by_padded_size.values() for i in range(0, len(keys), size)]
    yield from _load(_BatchDataset(dataset, config, train=False), batches[rank::world], config)


def step_keys(dataset: CocoDataset, config: Config, step: int) -> list[SampleKey]:
    """The samples of the global batch of a step. For one data set and config they depend on the step alone."""
    epoch, positions, copies = step_images(dataset, config, step)
    records = dataset.records  # its columns, because making a record takes longer than all of the rest
    columns = [column[positions].tolist() for column in (records.heights, records.widths, records.image_ids)]
    sizes = [
        resized_size(height, width, random_short_side(config.data, config.seed, epoch, image_id, copy), config.data)
        for height, width, image_id, copy in zip(*columns, copies, strict=True)
    ]
    padded_size = _padded_size(sizes, config.data)
    return [SampleKey(i, epoch, *padded_size, copy) for i, copy in zip(positions, copies, strict=True)]


def _padded_size(sizes: list[tuple[int, int]], config: Data) -> tuple[int, int]:
    multiple = config.pad_multiple
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


class _Sample(NamedTuple):
    image: NDArray[np.uint8] | Tensor
    target: Target
    key: SampleKey
    image_id: int
    unreadable: str  # why the file could not be read, "" if it could


class _Message(NamedTuple):
    """A batch on its way from a worker."""

    images: Tensor  # (N, H, W, 3)
    targets: list[tuple[NDArray[Any], ...]]
    sizes: list[tuple[int, int]]
    image_ids: list[int]
    unreadable: dict[int, str]
    slot: Slot | None  # of the memory of the images


class _BatchDataset(Dataset[_Message | DataError]):
    """Makes the batches, in the worker processes if there are any."""

    def __init__(self, dataset: CocoDataset, config: Config, train: bool) -> None:
        self.dataset, self.config, self.train = dataset, config, train
        self.cache = ImageCache(dataset.records, Path(config.data.cache)) if config.data.cache else None
        self.memory = BatchMemory(config.data.workers)

    def __getitems__(self, keys: list[SampleKey]) -> _Message | DataError:
        try:
            return self._batch(keys)
        except DataError as error:  # torch would put the traceback of the worker into its message
            return error

    def _batch(self, keys: list[SampleKey]) -> _Message:
        count, (height, width) = len(keys), keys[0][2:4]
        dtype = torch.float32 if self.config.data.resize == "torchvision" else torch.uint8
        memory, slot = self.memory.take(count * height * width * 3 * dtype.itemsize)
        images = memory.view(dtype).view(count, height, width, 3)
        samples = [self._sample(key, own.numpy()) for key, own in zip(keys, images, strict=True)]
        batch = _collate(samples, images, self.config.data)
        # Arrays are sent within the message. Each tensor would be a file of shared memory.
        arrays = [tuple(part.numpy() for part in target) for target in batch.targets]
        return _Message(images, arrays, batch.sizes, batch.image_ids, batch.unreadable, slot)

    def _sample(self, key: SampleKey, memory: NDArray[np.uint8]) -> _Sample:
        record = self.dataset.records[key.position]
        no_objects = _empty_target()
        try:
            if self.cache is not None:
                image = self.cache.read(key.position)
            else:
                image = read_image(record.path, (record.width, record.height))
        except DataError as error:
            if self.config.data.unreadable == "error":
                raise DataError(f"{error}; data.unreadable=skip leaves such images out") from None
            # A blank image, ignored as a whole, takes its place: batch size and padding stay, and it adds no loss.
            blank = np.zeros((key.height, key.width, 3), dtype=np.uint8)
            ignored = no_objects._replace(ignore=IGNORE_WHOLE_IMAGE)
            return _Sample(blank, ignored, key, record.image_id, str(error))
        if not self.train:
            return _Sample(eval_transform(image, self.config.data), no_objects, key, record.image_id, "")
        augmented, *target = train_transform(
            image, record, self.config.data, self.config.seed, key.epoch, key.copy, memory
        )
        return _Sample(augmented, Target(*target), key, record.image_id, "")


def _empty_target() -> Target:
    return Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


def _load(dataset: _BatchDataset, batches: Iterable[list[SampleKey]], config: Config) -> Iterator[Batch]:
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.data.workers,
        collate_fn=_unchanged,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
    )
    iterator = iter(loader)
    try:
        for message in iterator:
            if isinstance(message, DataError):
                raise message
            images, arrays, sizes, image_ids, unreadable, slot = message
            del message  # else its memory would be in use for longer than the batch
            if slot is not None and loader.pin_memory:  # a copy already
                dataset.memory.give_back(slot)
            elif slot is not None:
                images = dataset.memory.give_back_with(images, slot)
            targets = [Target(*(torch.from_numpy(part) for part in target)) for target in arrays]
            normalization = config.data.normalization
            batch = Batch(images.permute(0, 3, 1, 2), sizes, targets, image_ids, unreadable, normalization)
            del images  # else its memory would be in use for longer than the batch
            yield batch
            del batch
    finally:
        if config.data.workers:  # else an exit after an error would wait forever for the workers, which ignore SIGTERM
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _unchanged(batch: Any) -> Any:
    return batch


def image_batches(images: Iterable[NDArray[np.uint8]], config: Config) -> Iterator[Batch]:
    """The batches of uint8 RGB images (H, W, 3) that are not of a data set; `image_ids` are their positions from 0.

    They are those of `eval_batches` for the same images, in another order: an image waits until there are
    `train.eval_batch` of its padded size.
    """
    waiting: dict[tuple[int, int], list[_Sample]] = {}
    for position, image in enumerate(images):
        resized = eval_transform(image, config.data)
        size = resized.shape[1:] if isinstance(resized, Tensor) else resized.shape[:2]
        padded_size = _padded_size([(size[0], size[1])], config.data)
        samples = waiting.setdefault(padded_size, [])
        samples.append(_Sample(resized, _empty_target(), SampleKey(position, 0, *padded_size), position, ""))
        if len(samples) == config.train.eval_batch:
            yield _in_new_memory(waiting.pop(padded_size), config.data)
    yield from (_in_new_memory(samples, config.data) for samples in waiting.values())


def _in_new_memory(samples: list[_Sample], config: Data) -> Batch:
    dtype = torch.float32 if isinstance(samples[0].image, Tensor) else torch.uint8
    return _collate(samples, torch.empty(len(samples), *samples[0].key[2:4], 3, dtype=dtype), config)


def _collate(samples: list[_Sample], images: Tensor, config: Data) -> Batch:
    """A batch in the memory `images`, (N, H, W, 3), where some of the samples may be already."""
    sizes = []
    for padded, sample in zip(images, samples, strict=True):
        image = sample.image.permute(1, 2, 0) if isinstance(sample.image, Tensor) else torch.from_numpy(sample.image)
        height, width = image.shape[:2]
        if image.data_ptr() != padded.data_ptr():
            padded[:height, :width] = image
        padded[height:] = 0
        padded[:height, width:] = 0
        sizes.append((height, width))
    return Batch(
        images.permute(0, 3, 1, 2),
        sizes,
        [sample.target for sample in samples],
        [sample.image_id for sample in samples],
        {sample.image_id: sample.unreadable for sample in samples if sample.unreadable},
        config.normalization,
    )


def _init_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    # Ctrl-C, torchrun and schedulers signal all processes. Workers ignore it: the training process ends them itself,
    # after its step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
