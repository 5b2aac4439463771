"""The distribution of the class loss of a trained detector over its positive and its negative anchors (figure 4).

N images, R anchors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retina.assign import assign
from retina.config import Config
from retina.data.annotations import DataError
from retina.data.batch import Target
from retina.data.coco import CocoDataset, Record
from retina.data.loader import eval_batches
from retina.device import autocast
from retina.losses import sigmoid_focal_loss
from retina.model.anchors import make_anchors
from retina.model.retinanet import RetinaNet

GAMMAS = (0.0, 0.5, 1.0, 2.0)
BINS, LOWEST, HIGHEST = 4096, -12.0, 3.0  # bins of log10(loss), each 0.85 % wide


class LossHistogram:
    """The number and the sum of the losses in each bin of log10(loss): `counts` and `sums`, float64 (BINS,).

    The memory is constant. 500 images of 800 px have 100 million negatives: to sort them would take gigabytes for each
    gamma.
    """

    def __init__(self) -> None:
        self.counts, self.sums = np.zeros(BINS), np.zeros(BINS)

    def add(self, losses: Tensor) -> None:
        """Add losses of any shape, at least 0. Those beyond the outermost bins go into these; the sums stay exact."""
        losses = losses.double().flatten()
        position = (losses.log10() - LOWEST) / (HIGHEST - LOWEST) * BINS
        bins = position.nan_to_num(0).clamp(0, BINS - 1).long()  # any bin for NaN: its sum becomes NaN
        self.counts += torch.bincount(bins, minlength=BINS).cpu().numpy()
        self.sums += torch.bincount(bins, losses, minlength=BINS).cpu().numpy()

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The cumulative fraction of the losses, lowest first, and their part of the total loss; both from 0 to 1."""
        filled = self.counts > 0
        count, total = (np.append(0, np.cumsum(values[filled])) for values in (self.counts, self.sums))
        return count / count[-1], total / total[-1]

    def loss_fraction_of_hardest(self, fraction: float) -> float:
        """The part of the total that comes from the highest `fraction` of the losses; both from 0 to 1."""
        return float(1 - np.interp(1 - fraction, *self.curve()))


class LossDistribution(NamedTuple):
    """Histograms by gamma of the loss of each anchor, summed over its classes."""

    positives: dict[float, LossHistogram]
    negatives: dict[float, LossHistogram]
    images: int
    anchors: int  # in all images together, with the ignored ones

    def summary(self) -> dict[str, Any]:
        """The numbers for the JSON file; parts of a total are from 0 to 1."""
        positives, negatives = (by_gamma[0.0].counts.sum() for by_gamma in (self.positives, self.negatives))
        return {
            "images": self.images,
            "anchors_per_image": self.anchors / self.images,
            "positives_per_image": positives / self.images,
            "negatives_per_positive": negatives / positives,
            "gammas": [
                {
                    "gamma": gamma,
                    "hardest_1_percent_of_negatives": negative.loss_fraction_of_hardest(0.01),
                    "hardest_10_percent_of_negatives": negative.loss_fraction_of_hardest(0.1),
                    "hardest_20_percent_of_positives": positive.loss_fraction_of_hardest(0.2),
                    "negatives_of_class_loss": negative.sums.sum() / (negative.sums.sum() + positive.sums.sum()),
                }
                for (gamma, positive), negative in zip(self.positives.items(), self.negatives.values(), strict=True)
            ],
        }


@torch.inference_mode()
def measure_loss_distribution(
    model: RetinaNet, dataset: CocoDataset, config: Config, device: torch.device, progress: Any = iter
) -> LossDistribution:
    """Run the model on the data set, match anchors as in training, and compute the focal loss at each gamma of GAMMAS.

    The loss has no alpha: alpha is one factor for all positives and another for all negatives, so it changes no curve.
    Ignored anchors and unreadable images are excluded. `progress` wraps the iterable of batches. Source: paper, section
    5.1, "Analysis".

    Raises:
        DataError: there is no curve to draw, because there are no positives or the losses are not finite.
    """
    records, classes = {record.image_id: record for record in dataset.records}, dataset.num_classes
    positives, negatives = ({gamma: LossHistogram() for gamma in GAMMAS} for _ in range(2))
    images = anchors = 0
    # Without the cache: the data set may be a part of another, and would fill a file of its own.
    uncached = config.model_copy(update={"data": config.data.model_copy(update={"cache": None})})
    for batch in progress(eval_batches(dataset, uncached)):
        targets = [ground_truth(records[i], size) for i, size in zip(batch.image_ids, batch.sizes, strict=True)]
        batch = batch._replace(targets=targets).to(device)
        level_anchors = make_anchors(config.anchors, *batch.images.shape[2:], device)
        labels_NR = assign(level_anchors, batch.targets, batch.sizes, classes, config.assign).labels_NR
        with autocast(device, config.train.precision):
            outputs = model(batch.normalized().contiguous(memory_format=torch.channels_last))
        level_sizes = [len(level) for level in level_anchors]
        levels = list(zip(outputs.logits, torch.split(labels_NR, level_sizes, dim=1), strict=True))
        for i, image_id in enumerate(batch.image_ids):  # image by image, because unreduced losses are large
            if image_id in batch.unreadable:
                continue
            images, anchors = images + 1, anchors + labels_NR.shape[1]
            for gamma in GAMMAS:
                for logits, labels in levels:
                    losses = sigmoid_focal_loss(logits[i], labels[i], alpha=None, gamma=gamma, reduction="none").sum(-1)
                    positives[gamma].add(losses[(labels[i] >= 0) & (labels[i] < classes)])
                    negatives[gamma].add(losses[labels[i] == classes])
    for name, by_gamma in (("positive", positives), ("negative", negatives)):
        for gamma, histogram in by_gamma.items():
            if not 0 < histogram.sums.sum() < math.inf:
                raise DataError(
                    f"{dataset.annotations}: {images} images have {histogram.counts.sum():.0f} {name} anchors; their "
                    f"losses at gamma {gamma:g} add up to {histogram.sums.sum()}: expected a finite number above 0"
                )
    return LossDistribution(positives, negatives, images, anchors)


def ground_truth(record: Record, size: tuple[int, int]) -> Target:
    """The boxes, labels and ignored regions of an image, in pixels of its evaluation `size` (height, width)."""
    scale = torch.tensor([size[1] / record.width, size[0] / record.height] * 2)
    boxes, ignore = (torch.from_numpy(part) * scale for part in (record.boxes, record.ignore))
    return Target(boxes, torch.from_numpy(record.labels), ignore)
