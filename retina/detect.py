"""Outputs of the network -> the boxes, scores and labels of each image.

The score threshold acts on logits, because the sigmoid is monotonic. So only the candidates above it need a sigmoid and
a decoded box.

On the CPU, one image after the other, only with the candidates above the threshold: this is the reference. On CUDA, all
images at once, in tensors whose shapes do not depend on their values. So the host waits for the device only once, for
the number of detections of each image. Both find the same detections, up to rounding. But if a level has more than
`candidates` logits above the threshold, and several that are equal to the last one chosen, either may choose others of
these.

N images, R anchors of a level, A of them chosen, K classes, C candidates of an image, D detections of an image, M the
largest D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from retina import config as cfg
from retina.boxes import clip_boxes_to_image, decode
from retina.losses.focal import HAS_TRITON, warn_triton_missing
from retina.model.retinanet import Outputs

LOW_BITS = 2**32 - 1  # an image has fewer pairs of an anchor and a class: their logits alone would take 8 GiB


class Detections(NamedTuple):
    """Detections on one image in order of falling score, on the CPU; boxes in pixels of the network's input."""

    boxes: Tensor  # float32 (D, 4) xyxy
    scores: Tensor  # float32 (D,)
    labels: Tensor  # int64 (D,), 0..K-1


@torch.no_grad()
def detect(
    outputs: Outputs, anchors: tuple[Tensor, ...], sizes: list[tuple[int, int]], config: cfg.Detect
) -> list[Detections]:
    """Threshold, take the best candidates of each level, decode, clip, NMS within each class (paper, section 4).

    `sizes`: (height, width) of each image without its padding, to which boxes are clipped, before NMS or after it
    (`detect.clip`). Returns the detections of each image. Raises ValueError for another number of sizes than of images.
    """
    return start_detection(outputs, anchors, sizes, config)()


@torch.no_grad()
def start_detection(
    outputs: Outputs, anchors: tuple[Tensor, ...], sizes: list[tuple[int, int]], config: cfg.Detect
) -> Callable[[], list[Detections]]:
    """As `detect`, in two parts: the function that is returned waits for the device and returns the detections.

    So the host can start the next batch meanwhile.
    """
    images = len(outputs.logits[0])
    if len(sizes) != images:
        raise ValueError(f"sizes: given {len(sizes)} for {images} images, expected (height, width) of each image")
    is_cuda = outputs.logits[0].is_cuda
    if is_cuda and not HAS_TRITON:
        warn_triton_missing()
    elif is_cuda and sizes:
        batch = [_start_copy(part) for part in _detect_batch(outputs, anchors, sizes, config)]
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

        def finish() -> list[Detections]:
            copied.synchronize()  # the only wait
            *parts, found_N = batch
            found = [Detections(*(part[i, :count] for part in parts)) for i, count in enumerate(found_N.tolist())]
            return _clip_each(found, sizes, config) if config.clip == "after_nms" else found

        return finish
    detections = [
        _detect_image([x[i] for x in outputs.logits], [x[i] for x in outputs.deltas], anchors, size, config)
        for i, size in enumerate(sizes)
    ]
    return lambda: [Detections(*(part.cpu() for part in each)) for each in detections]


def _start_copy(on_device: Tensor) -> Tensor:
    """A copy in pinned memory, complete when the device has come so far."""
    return torch.empty_like(on_device, device="cpu", pin_memory=True).copy_(on_device, non_blocking=True)


def _detect_image(
    logits: list[Tensor],
    deltas: list[Tensor],
    anchors: tuple[Tensor, ...],
    size: tuple[int, int],
    config: cfg.Detect,
) -> Detections:
    threshold = _logit_threshold(config)
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
    found = Detections(torch.cat(boxes), torch.cat(kept_logits).sigmoid(), torch.cat(labels))
    if config.clip == "before_nms":
        (found,) = _clip_each([found], [size], config)
    keep = batched_nms(*found, config.nms_iou)[: config.max_detections]
    found = Detections(*(part[keep] for part in found))
    return _clip_each([found], [size], config)[0] if config.clip == "after_nms" else found


def _clip_each(found: list[Detections], sizes: list[tuple[int, int]], config: cfg.Detect) -> list[Detections]:
    """Boxes clipped to the size of their image; those without area are dropped, if the config says so."""
    clipped = [
        each._replace(boxes=clip_boxes_to_image(each.boxes, size)) for each, size in zip(found, sizes, strict=True)
    ]
    if config.empty_boxes == "drop":
        has_area = [(each.boxes[:, 2:] > each.boxes[:, :2]).all(dim=1) for each in clipped]
        clipped = [Detections(*(part[kept] for part in each)) for each, kept in zip(clipped, has_area, strict=True)]
    return clipped


def batched_nms(boxes_D4: Tensor, scores_D: Tensor, labels_D: Tensor, iou: float) -> Tensor:
    """Indices of the boxes that NMS within each class keeps, in order of falling score; int64.

    One NMS runs over all boxes, after an offset for each class has separated the classes. It runs in float64: in
    float32, the offset of class 90 would cost the coordinates seven bits. NMS class by class would need one kernel a
    class.
    """
    if not len(boxes_D4):
        return labels_D
    boxes_f64 = boxes_D4.double()
    offset = (boxes_f64.max() - boxes_f64.min().clamp(max=0) + 1) * labels_D
    keep: Tensor = nms(boxes_f64 + offset[:, None], scores_D.double(), iou)
    return keep


def _logit_threshold(config: cfg.Detect) -> float:
    return math.log(config.score_threshold / (1 - config.score_threshold))


def _detect_batch(
    outputs: Outputs, anchors: tuple[Tensor, ...], sizes: list[tuple[int, int]], config: cfg.Detect
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (N, M, 4), scores (N, M) and labels (N, M) as in Detections, and how many each image has, int32 (N,).

    What is beyond that number has no meaning. The host does not wait for the device.
    """
    from retina.losses.nms_triton import nms as nms_of_batch  # here, because importing Triton is slow

    logits_NC, index_NC = _best_candidates(outputs.logits, config.candidates)
    scores_NC, index_NC, count_N = _in_order(logits_NC, index_NC, _logit_threshold(config))
    num_classes = outputs.logits[0].shape[2]
    anchor_NC, labels_NC = index_NC // num_classes, index_NC % num_classes
    deltas_NC4 = torch.cat(outputs.deltas, dim=1).take_along_dim(anchor_NC[:, :, None], dim=1)
    boxes_NC4 = decode(deltas_NC4, torch.cat(anchors)[anchor_NC], config.max_ratio)
    clips = config.clip == "before_nms"
    if clips:
        boxes_NC4 = _clip_batch(boxes_NC4, sizes)
    drops = clips and config.empty_boxes == "drop"
    keep_NM, found_N = nms_of_batch(boxes_NC4, labels_NC, count_N, config.nms_iou, config.max_detections, drops)
    boxes_NM4 = boxes_NC4.take_along_dim(keep_NM[:, :, None], dim=1)
    return boxes_NM4, scores_NC.gather(1, keep_NM), labels_NC.gather(1, keep_NM), found_N


def _clip_batch(boxes_NC4: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    limits_N4 = torch.tensor([(width, height) * 2 for height, width in sizes], dtype=boxes_NC4.dtype).reshape(-1, 4)
    if boxes_NC4.is_cuda:
        limits_N4 = limits_N4.pin_memory().to(boxes_NC4.device, non_blocking=True)
    return torch.minimum(boxes_NC4.clamp(min=0), limits_N4[:, None])


def _best_candidates(logits: list[Tensor], candidates: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each level in no order, (N, C) in their dtype, and their indices (N, C).

    The index counts pairs of an anchor (of all levels) and a class. The best pairs of a level belong to as many anchors
    at most, those with the largest maximum over the classes. So one pass over all logits finds these maxima, and the
    rest is small.
    """
    from retina.detect_triton import max_over_classes

    kept_logits, kept_index, start = [], [], 0
    for logits_NRK in logits:
        rows, classes = logits_NRK.shape[1:]
        best_NA = max_over_classes(logits_NRK).topk(min(candidates, rows), sorted=False).indices
        logits_NAK = logits_NRK.take_along_dim(best_NA[:, :, None], dim=1)
        pairs = logits_NAK.shape[1] * classes
        logits_NC, pair_NC = logits_NAK.flatten(1).topk(min(candidates, pairs), sorted=False)
        kept_logits.append(logits_NC)
        kept_index.append((start + best_NA.gather(1, pair_NC // classes)) * classes + pair_NC % classes)
        start += rows
    return torch.cat(kept_logits, dim=1), torch.cat(kept_index, dim=1)


def _in_order(logits_NC: Tensor, index_NC: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (N, C) and indices (N, C) in order of falling score, and how many are above the threshold, int32 (N,).

    Equal scores are in the order of their indices, as in `_detect_image`. What is not above the threshold comes last,
    without a meaning.
    """
    is_above_NC = logits_NC > threshold  # in the dtype of the logits, to which the threshold is rounded
    # One integer to sort by: the bits of the score, which rise with it because it is not negative, then the index.
    scores_NC = logits_NC.float().sigmoid()
    key_NC = (scores_NC.view(torch.int32).long() << 32) | (LOW_BITS - index_NC)
    key_NC = torch.where(is_above_NC, key_NC, -1).sort(dim=1, descending=True).values
    scores_NC = (key_NC >> 32).int().view(torch.float32)
    return scores_NC, LOW_BITS - (key_NC & LOW_BITS), is_above_NC.sum(dim=1, dtype=torch.int32)
