"""Which images an epoch has, how often, and in which batches. The seed and the step determine it.

`data.sampling=uniform`: each image once. `data.sampling=repeat_factor`: images of rare classes several times (Gupta et
al., "LVIS", CVPR 2019, https://arxiv.org/abs/1908.03195, section 5.2; `RepeatFactorTrainingSampler` of detectron2,
`ClassBalancedDataset` of mmdetection). The repeat factor of

    a class     max(1, sqrt(t / f)); f: the share of the images that have an object of it, t: `data.repeat_threshold`
    an image    the largest among the classes of its objects; 1 without objects

is how often the image is drawn in an epoch. It is rounded up or down at random, anew in each epoch, so that its mean
over the epochs is the factor. Every epoch has the same number of samples, the sum of the factors rounded down, so the
epoch of a step is a division. The copies of an image are augmented differently. Two of them may be in one batch.

Crowd regions are not objects. The run has `train.steps` steps as before: epochs are longer, and there are fewer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retina.config import Config, Data
from retina.data.coco import CocoDataset, Records

_ONE = 2**32  # the factor 1: factors are summed in integers of this unit, which are exact in any order


class StepImages(NamedTuple):
    """The images of the global batch of a step."""

    epoch: int
    positions: list[int]  # in dataset.records
    copies: list[int]  # for each, how many earlier copies of the same image the epoch has


def step_images(dataset: CocoDataset, config: Config, step: int) -> StepImages:
    """The images of a step. For one data set and config they depend on the step alone."""
    size, threshold = config.train.batch_size, _threshold(config.data)
    per_epoch = max(1, _samples_per_epoch(dataset, threshold) // size)
    epoch, position = divmod(step, per_epoch)
    positions, copies, batches = _epoch(dataset, threshold, size, config.seed, epoch)
    batch = batches[position]
    return StepImages(epoch, positions[batch].tolist(), copies[batch].tolist())


def class_frequencies(records: Records, num_classes: int) -> NDArray[np.float64]:
    """The share of the images that have an object of each class, (K,)."""
    _, classes = _classes_of_images(records, num_classes)
    return np.bincount(classes, minlength=num_classes) / len(records)


def repeat_factors(records: Records, num_classes: int, threshold: float) -> NDArray[np.float64]:
    """How often each image is drawn in an epoch, on average, (B,).

    Args:
        records: of the training set.
        num_classes: K.
        threshold: images of a class that is in a smaller share of the images are repeated.
    """
    images, classes = _classes_of_images(records, num_classes)
    frequencies = np.bincount(classes) / len(records)
    factors = np.ones(len(records))
    np.maximum.at(factors, images, np.sqrt(threshold / frequencies[classes]))
    return factors


def draw_samples(factors: NDArray[np.float64], seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The images of an epoch, in ascending order: their indices into `factors`, and the number of each copy from 0.

    Systematic sampling: the factors, in random order, are laid end to end on a line. A comb of points at distance 1,
    with one random offset, lies on it, and each point draws the image that it is on. So an image is drawn `factor`
    times, rounded down or up.

    The number of samples is the sum of the factors, rounded down. If it was not an integer, some combs have one point
    more. It is left out; it is on the last image, a random one.

    Args:
        factors: (B,), each at least 1.
        seed: of the run.
        epoch: counts from 0.
    """
    rng = np.random.default_rng([seed, epoch, 2**63])  # not a generator of augment.py: their image ids are below 2**63
    order = rng.permutation(len(factors))
    lengths = _to_units(factors)
    ends = (np.cumsum(lengths[order]) + rng.integers(_ONE)) // _ONE
    ends = np.minimum(ends, lengths.sum() // _ONE)  # without the point too many
    counts = np.empty(len(factors), dtype=np.int64)
    counts[order] = np.diff(ends, prepend=0)
    copies = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(np.arange(len(factors)), counts), copies


def epoch_order(is_landscape: NDArray[np.bool_], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of sample indices for one epoch, in random order.

    Fewer than `size` samples are omitted, chosen at random among all. Landscape and portrait images are in separate
    batches, to save padding; what these leave over is mixed in one more batch. Fewer than `size` samples are repeated
    to fill one batch.

    Args:
        is_landscape: (S,), for each sample whether the width of its image is at least the height.
        size: samples in a batch.
        seed: of the run.
        epoch: counts from 0.

    Returns:
        Lists of `size` indices into `is_landscape`.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(is_landscape))
    if len(order) < size:
        return [np.resize(order, size).tolist()]
    order = order[: len(order) - len(order) % size]
    batches, remaining = [], []
    for orientation in (True, False):
        group = order[is_landscape[order] == orientation].tolist()
        num_batched = len(group) - len(group) % size
        batches += [group[i : i + size] for i in range(0, num_batched, size)]
        remaining += group[num_batched:]
    if remaining:  # exactly `size` samples
        batches.append(remaining)
    return [batches[i] for i in rng.permutation(len(batches))]


def describe_sampling(dataset: CocoDataset, config: Data) -> str:
    """What `data.sampling` does with a training set, for the log; empty if each image is used once."""
    threshold, images = _threshold(config), len(dataset.records)
    if threshold is None:
        return ""
    frequencies = class_frequencies(dataset.records, dataset.num_classes)
    rarest = int(np.where(frequencies > 0, frequencies, np.inf).argmin())
    where = f"{dataset.names[rarest]}, which is in {100 * frequencies[rarest]:.3g} % of the images"
    start = f"sampling: repeat_factor, threshold {threshold:g}"
    if not 0 < frequencies[rarest] < threshold:
        rarest_class = f"the rarest class is {where}" if frequencies[rarest] else "there are no objects"
        return f"{start}: no image is repeated, because {rarest_class}; see data.repeat_threshold"
    return (
        f"{start}: {_samples_per_epoch(dataset, threshold)} samples per epoch instead of {images}; "
        f"most repeated class: {where}, {np.sqrt(threshold / frequencies[rarest]):.2f} times"
    )


def _threshold(config: Data) -> float | None:
    return config.repeat_threshold if config.sampling == "repeat_factor" else None


def _classes_of_images(records: Records, num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(position of the image, class) for each class of each image, once however many objects it has."""
    positions, labels = records.object_labels()
    images, classes = np.divmod(np.unique(positions * num_classes + labels), num_classes)
    return images, classes


def _to_units(factors: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.ceil(factors * _ONE).astype(np.int64)  # up, so that 30 times 1.4 is not below 42


@lru_cache(maxsize=2)
def _cached_factors(dataset: CocoDataset, threshold: float) -> NDArray[np.float64]:
    return repeat_factors(dataset.records, dataset.num_classes, threshold)


@lru_cache(maxsize=2)
def _samples_per_epoch(dataset: CocoDataset, threshold: float | None) -> int:
    if threshold is None:
        return len(dataset.records)
    return int(_to_units(_cached_factors(dataset, threshold)).sum() // _ONE)


@lru_cache(maxsize=2)
def _epoch(
    dataset: CocoDataset, threshold: float | None, size: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[list[int]]]:
    """The samples of an epoch: their images, their numbers of copies, and the batches, lists of indices into both."""
    records = dataset.records
    if threshold is None:
        positions, copies = np.arange(len(records)), np.zeros(len(records), dtype=np.int64)
    else:
        positions, copies = draw_samples(_cached_factors(dataset, threshold), seed, epoch)
    is_landscape = records.widths >= records.heights
    batches = epoch_order(is_landscape[positions], size, seed, epoch)
    if len(positions) < size:  # the one batch repeats samples: these are further copies
        positions = positions[batches[0]]
        copies = np.tril(positions[:, None] == positions, -1).sum(axis=1)
        batches = [list(range(size))]
    return positions, copies, batches
