"""Outputs of the network -> the boxes, scores and labels of each image.

The score threshold acts on logits, because the sigmoid is monotonic. So only the candidates above it need a sigmoid and
a decoded box.
N images, R anchors of a level, K classes, D detections of an image.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from retina import config as cfg
from retina.boxes import clip_boxes_to_image, decode
from retina.model.retinanet import Outputs


class Detections(NamedTuple):
    """Detections on one image in order of falling score; boxes in pixels of the network's input."""

    boxes: Tensor  # float32 (D, 4) xyxy
    scores: Tensor  # float32 (D,)
    labels: Tensor  # int64 (D,), 0..K-1


@torch.no_grad()
def detect(
    outputs: Outputs, anchors: tuple[Tensor, ...], sizes: list[tuple[int, int]], config: cfg.Detect
) -> list[Detections]:
    """Threshold, take the best candidates of each level, decode, clip, NMS within each class (paper, section 4).

    `sizes`: (height, width) of each image without its padding; boxes are clipped to it before NMS. Returns the
    detections of each image.
    """
    return [
        _detect_image([x[i] for x in outputs.logits], [x[i] for x in outputs.deltas], anchors, size, config)
        for i, size in enumerate(sizes)
    ]


def _detect_image(
    logits: list[Tensor],
    deltas: list[Tensor],
    anchors: tuple[Tensor, ...],
    size: tuple[int, int],
    config: cfg.Detect,
) -> Detections:
    threshold = math.log(config.score_threshold / (1 - config.score_threshold))
    boxes, kept_logits, labels = [], [], []
    for logits_RK, deltas_R4, anchors_R4 in zip(logits, deltas, anchors, strict=True):
        flat_logits = logits_RK.flatten()
        index = (flat_logits > threshold).nonzero()[:, 0]
        candidate_logits = flat_logits[index].float()
        if len(index) > config.candidates:
            candidate_logits, best = candidate_logits.topk(config.candidates)
            index = index[best]
        anchor = index // logits_RK.shape[1]
        boxes.append(decode(deltas_R4[anchor], anchors_R4[anchor], config.max_ratio))
        kept_logits.append(candidate_logits)
        labels.append(index % logits_RK.shape[1])
    all_boxes = clip_boxes_to_image(torch.cat(boxes), size)
    all_scores, all_labels = torch.cat(kept_logits).sigmoid(), torch.cat(labels)
    keep = batched_nms(all_boxes, all_scores, all_labels, config.nms_iou)[: config.max_detections]
    return Detections(all_boxes[keep], all_scores[keep], all_labels[keep])


def batched_nms(boxes_D4: Tensor, scores_D: Tensor, labels_D: Tensor, iou: float) -> Tensor:
    """Indices of the boxes that NMS within each class keeps, in order of falling score; int64.

    One NMS runs over all boxes, after an offset for each class has separated the classes. It runs in float64: in
    float32, the offset of class 90 would cost the coordinates seven bits. NMS class by class would need one kernel a
    class.
    """
    if not len(boxes_D4):
        return labels_D
    boxes_f64 = boxes_D4.double()
    offset = (boxes_f64.max() + 1) * labels_D
    keep: Tensor = nms(boxes_f64 + offset[:, None], scores_D.double(), iou)
    return keep
