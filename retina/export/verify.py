"""Compares the detections of an exported file with those of the network in PyTorch, on the same images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from retina import config as cfg
from retina.config import Config
from retina.detect import Detections
from retina.evaluate.detections import ImageDetections
from retina.evaluate.detector import Detector

AnyDetections = Detections | ImageDetections
MAX_BOX_DIFFERENCE = 0.1  # pixels
MAX_SCORE_DIFFERENCE = 1e-3
MAX_CHANGED = 0.01  # of the detections
MIN_DETECTIONS = 10  # with fewer, a comparison says nothing
SAME_PLACE = 0.25  # of the longer side of a box


class Difference(NamedTuple):
    """Of an exported file from the network in PyTorch.

    boxes, scores: the largest difference of a detection of the file from PyTorch's nearest box before NMS.
    changed: how many detections only one of the two has. There are some even if both compute the same, because
        rounding decides which of two overlapping boxes with almost equal scores NMS keeps. Those with a score within
        0.001 of the lowest possible are not counted.
    """

    images: int
    detections: int
    boxes: float
    scores: float
    changed: int

    @property
    def is_rounding(self) -> bool:
        """Whether the file computes the same, up to the rounding of float32."""
        is_close = self.boxes <= MAX_BOX_DIFFERENCE and self.scores <= MAX_SCORE_DIFFERENCE
        return is_close and self.changed <= max(1, MAX_CHANGED * self.detections)

    def describe(self) -> str:
        """For people."""
        return (
            f"{self.images} images, {self.detections} detections: boxes differ by at most {self.boxes:.4f} px, "
            f"scores by at most {self.scores:.6f}; {self.changed} detections are in one of the two only"
        )


def compare_with_eager(
    run: Callable[[NDArray[np.uint8]], list[Detections]],
    detector: Detector,
    images: list[NDArray[np.uint8]],
    resizes: bool,
    batch: int = 1,
) -> Difference:
    """`run` and `detector` in float32, on each of `images`, uint8 RGB (H, W, 3).

    `resizes`: whether `run` resizes an image; otherwise `detector` does not either. `run` gets `batch` copies of it.
    """
    config = detector.config
    train = config.train.model_copy(update={"precision": "fp32"})
    before_nms = config.detect.model_copy(update={"nms_iou": 1.0, "max_detections": 10**6})
    results = []
    for image in images:
        data = config.data
        if not resizes:
            data = data.model_copy(update={"eval_short_side": min(image.shape[:2]), "max_side": max(image.shape[:2])})
        eager = config.model_copy(update={"train": train, "data": data})
        with_candidates = eager.model_copy(update={"detect": before_nms})
        expected, candidates = (_with_config(detector, c)(image) for c in (eager, with_candidates))
        results.append(compare(run(np.stack([image] * batch))[-1], expected, candidates, config.detect))
    boxes, scores, changed, detections = zip(*results, strict=True)
    return Difference(len(images), sum(detections), max(boxes), max(scores), sum(changed))


def _with_config(detector: Detector, config: Config) -> Detector:
    return Detector(detector.model, config, detector.categories, detector.device, detector.source)


def compare(
    found: Detections, expected: AnyDetections, candidates: AnyDetections, config: cfg.Detect
) -> tuple[float, float, int, int]:
    """`boxes`, `scores`, `changed` and `detections` of one image; see Difference. `config`: of the detections."""
    boxes = scores = 0.0
    if len(found.scores):
        box_MC, score_MC = _distances(found, candidates)
        # By both, because several boxes may be clipped to the same one.
        nearest_M1 = torch.maximum(box_MC / MAX_BOX_DIFFERENCE, score_MC / MAX_SCORE_DIFFERENCE).argmin(1, keepdim=True)
        boxes, scores = float(box_MC.gather(1, nearest_M1).max()), float(score_MC.gather(1, nearest_M1).max())
    changed = 0
    full = [float(each.scores.min()) for each in (found, expected) if len(each.scores) == config.max_detections]
    lowest = max([config.score_threshold, *full]) + MAX_SCORE_DIFFERENCE
    for ones, others in ((found, expected), (expected, found)):
        sides = (ones.boxes[:, 2:] - ones.boxes[:, :2]).amax(dim=1).clamp(min=4)
        is_alone = _distances(ones, others)[0].amin(dim=1) > SAME_PLACE * sides
        changed += int((is_alone & (ones.scores > lowest)).sum())
    return boxes, scores, changed, len(expected.scores)


def _distances(ones: AnyDetections, others: AnyDetections) -> tuple[Tensor, Tensor]:
    """Of each of `ones` from each of `others`: the largest of the coordinates, and of the scores. Infinite for another
    class; the last column, which is infinite, stands for none.
    """
    box_MC = (ones.boxes[:, None] - others.boxes).abs().amax(dim=2)
    score_MC = (ones.scores[:, None] - others.scores).abs()
    is_same_MC = ones.labels[:, None] == others.labels
    box_MC, score_MC = (distances.where(is_same_MC, torch.inf) for distances in (box_MC, score_MC))
    return F.pad(box_MC, (0, 1), value=torch.inf), F.pad(score_MC, (0, 1), value=torch.inf)
