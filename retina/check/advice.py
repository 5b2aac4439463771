"""Settings that fit a data set better than those of the config, each with its reason.

The anchors are chosen by their reach: the mean over the classes of the share of objects for which an anchor has an IoU
of at least `assign.positive_iou`, with centers that differ by a quarter of a stride in x and y, the mean over random
positions. An octave_base below 2 is never advised, because it sees all objects on a coarser level than they need: it
led to a lower AP, and so did a larger one with less reach (docs/results/data_check.md). A setting is advised only if
its reach is clearly larger. Nothing is trained.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retina.check.anchor_fit import AnchorFit, shape_iou
from retina.config import Anchors, Config
from retina.data.coco import CocoDataset

MEAN_OFFSET = 0.25  # strides
MAX_OBJECTS = 5000  # a random part of more; enough for shares to half a point
GAIN = 0.05  # of the reach, below which nothing is advised
BASE_TOLERANCE = 0.002  # of the reach, which a larger octave_base may have less than the best
MORE_ANCHORS_GAIN = 0.08  # more anchors make the step slower
BASES = (8, 6, 5, 4, 3, 2.5, 2)  # a large base sees an object on a finer level
RATIOS = ((0.5, 1.0, 2.0), (0.4, 1.0, 2.5), (0.33, 1.0, 3.0), (0.25, 1.0, 4.0), (0.2, 1.0, 5.0))
MANY_RATIOS = ((0.25, 0.5, 1.0, 2.0, 4.0), (0.17, 0.4, 1.0, 2.5, 6.0))
MIN_SIDE = 12.0  # pixels; below about 1.5 strides of P3 there is little to see
PRIOR_FACTOR = 4.0  # between the prior and the share of positives, from which another prior is advised


class Advice(NamedTuple):
    """A setting as on the command line, `section.key=value`, and why."""

    setting: str
    reason: str


def advise(
    dataset: CocoDataset, sizes: NDArray[np.float64], labels: NDArray[np.int64], fit: AnchorFit, config: Config
) -> list[Advice]:
    """Settings for the training data, at most one for each key.

    Args:
        dataset: the training data.
        sizes: (T, 2) width and height of every object in pixels of its resized image.
        labels: (T,).
        fit: of the anchors of `config`.
        config: that the advice would change.
    """
    if not len(labels):
        return []
    image_size, scale = _image_size(dataset, sizes, config)
    return [
        *image_size,
        *_anchors(sizes * scale, labels, config),  # at the size that is advised
        *_prior(fit, dataset.num_classes, config),
        *_max_detections(dataset, config),
    ]


def reach(sizes: NDArray[np.float64], labels: NDArray[np.int64], anchors: Anchors, positive_iou: float) -> float:
    """The mean over the classes of the share of objects that an anchor fits; see the top of this file."""
    reached = shape_iou(sizes, anchors, MEAN_OFFSET) >= positive_iou
    count = np.bincount(labels)
    return float(np.mean((np.bincount(labels, reached) / np.maximum(count, 1))[count > 0]))


def _anchors(sizes: NDArray[np.float64], labels: NDArray[np.int64], config: Config) -> list[Advice]:
    """One key after the other: octave_base, then ratios, then scales. The simplest change that brings enough wins."""
    if len(labels) > MAX_OBJECTS:
        chosen = np.random.default_rng(0).choice(len(labels), MAX_OBJECTS, replace=False)
        sizes, labels = sizes[chosen], labels[chosen]
    advice: dict[str, Advice] = {}  # by key
    start: dict[str, float] = {}  # the reach before a key was changed
    current = config.anchors
    before = reach(sizes, labels, current, config.assign.positive_iou)

    def try_values(key: str, values: Any, gain: float, tolerance: float, reason: str) -> None:
        nonlocal current, before
        candidates = [current.model_copy(update={key: value}) for value in values]
        reaches = [reach(sizes, labels, candidate, config.assign.positive_iou) for candidate in candidates]
        # Values are in order of preference: the first whose reach is near the best.
        best = next(i for i, value in enumerate(reaches) if value >= max(reaches) - tolerance)
        if reaches[best] < before + gain:
            return
        value = getattr(candidates[best], key)
        text = f"[{','.join(f'{ratio:g}' for ratio in value)}]" if isinstance(value, tuple) else f"{value:g}"
        old = start.setdefault(key, before)
        share = f"an anchor fits {reaches[best]:.0%} of the objects (mean over the classes) instead of {old:.0%}"
        advice[key] = Advice(f"anchors.{key}={text}", f"{share}; {reason}")
        current, before = candidates[best], reaches[best]

    smallest = f"the smallest anchor has octave_base x 8 pixels, {_quantiles(sizes)}"
    try_values("octave_base", BASES, GAIN, BASE_TOLERANCE, smallest)
    aspects = np.percentile(sizes[:, 1] / np.maximum(sizes[:, 0], 1e-6), [5, 50, 95])
    shape = "height / width of the objects is {:.2g}, {:.2g} and {:.2g} at 5, 50 and 95 %".format(*aspects)
    if len(current.ratios) <= 3:
        try_values("ratios", RATIOS, GAIN, GAIN / 2, shape)
        more = f"{shape}; more anchors, so a slower step"
        try_values("ratios", MANY_RATIOS, MORE_ANCHORS_GAIN, MORE_ANCHORS_GAIN / 2, more)
    if more_scales := [scales for scales in (1, 2, 3, 4) if scales > current.scales]:
        slower = "more anchors, so a slower step"
        try_values("scales", more_scales, MORE_ANCHORS_GAIN, MORE_ANCHORS_GAIN / 2, slower)
    return list(advice.values())


def _quantiles(sizes: NDArray[np.float64]) -> str:
    sides = np.percentile(np.sqrt(sizes.prod(axis=1)), [5, 50, 95])
    return "the objects {:.0f}, {:.0f} and {:.0f} (square root of the area at 5, 50 and 95 %)".format(*sides)


def _image_size(dataset: CocoDataset, sizes: NDArray[np.float64], config: Config) -> tuple[list[Advice], float]:
    """Larger images, if a tenth of the objects is tiny and the files have more pixels than are used.

    Returns: the advice, and by how much it enlarges the objects.
    """
    side = float(np.percentile(np.sqrt(sizes.prod(axis=1)), 10))
    short_side = config.data.eval_short_side or config.data.short_side[-1]
    stored = float(np.median(np.minimum(dataset.records.widths, dataset.records.heights)))
    longest = float(np.median(np.maximum(dataset.records.widths, dataset.records.heights)))
    used = min(short_side, config.data.max_side * stored / longest)
    factor = min(MIN_SIDE / max(side, 1e-6), stored / used)
    if side >= MIN_SIDE or factor < 1.2:
        return [], 1.0
    wanted = math.ceil(used * factor / 16) * 16
    reason = (
        f"a tenth of the objects is smaller than {side:.0f} pixels in images of {used:.0f} pixels, and the files have "
        f"{stored:.0f}; a step takes about {(wanted / used) ** 2:.1f} times as long"
    )
    wanted_sides = [math.ceil(side * wanted / used / 16) * 16 for side in config.data.short_side]
    advice = [Advice(f"data.short_side=[{','.join(map(str, wanted_sides))}]", reason)]
    if config.data.eval_short_side is not None:
        advice.append(Advice(f"data.eval_short_side={wanted}", "the same size in the evaluation"))
    if config.data.max_side < wanted * longest / stored:
        advice.append(
            Advice(f"data.max_side={math.ceil(wanted * longest / stored)}", "so that short_side has its effect")
        )
    return advice, wanted / used


def _prior(fit: AnchorFit, num_classes: int, config: Config) -> list[Advice]:
    share = fit.positives / max(fit.positives + fit.negatives, 1) / num_classes
    if not share > PRIOR_FACTOR * config.model.prior:
        return []
    reason = f"{share:.1%} of the outputs of a class are positive, and the prior is {config.model.prior:.1%}"
    return [Advice(f"model.prior={share:.1g}", reason)]


def _max_detections(dataset: CocoDataset, config: Config) -> list[Advice]:
    most = int(dataset.records.num_objects.max())
    if most <= config.detect.max_detections:
        return []
    return [Advice(f"detect.max_detections={math.ceil(1.2 * most / 100) * 100}", f"an image has {most} objects")]
