"""The whole detector as one module over tensors: uint8 images in, boxes in their pixels out.

It repeats, as a graph, what a detector (evaluate/detector.py) does with an image: the resize, the padding, the network,
and the rules of detect.py. No shape depends on the values of a tensor, but for the number of boxes inside NMS.

N images, R anchors of a level, K classes, C candidates of an image, D = `detect.max_detections`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from retina.boxes import decode
from retina.config import Config, Data, Detect
from retina.data.augment import resized_size
from retina.export.resize import normalized, output_size, resize_and_normalize
from retina.model.anchors import make_anchors

INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels", "count")
EXAMPLE = (2, 480, 640)  # batch, height and width where they are free
# Boxes (N, C, 4), scores (N, C) that are 0 for no candidate, labels (N, C), IoU -> bool (N, C): what NMS keeps.
Suppress = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class InputShape(NamedTuple):
    """Of the images that an exported file takes; None where any number will do."""

    batch: int | None = None
    height: int | None = None
    width: int | None = None

    def example(self) -> Tensor:
        return torch.zeros(*(given or free for given, free in zip(self, EXAMPLE, strict=True)), 3, dtype=torch.uint8)

    def accepts(self, size: tuple[int, ...]) -> bool:
        """Whether the file takes images of this (height, width)."""
        return all(given in (None, side) for given, side in zip(self[1:], size, strict=True))

    def describe(self) -> str:
        """For people."""
        height, width = ("any" if side is None else side for side in self[1:])
        size = "any size" if height == width == "any" else f"{height}x{width} px (height x width)"
        return f"{'any number of' if self.batch is None else self.batch} images of {size}"

    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        return ({dim: torch.export.Dim.DYNAMIC for dim, given in enumerate(self) if given is None},)


class DetectionProgram(nn.Module):
    """uint8 RGB images (N, H, W, 3), all of one size -> boxes, scores, labels, count.

    boxes: float32 (N, D, 4) xyxy in pixels of `images`. scores: float32 (N, D), falling. labels: int64 (N, D), 0..K-1.
    count: int64 (N,), how many detections each image has. Beyond it, boxes and scores are 0 and labels -1. A fixed D
    makes one array of a batch; a caller knows its memory before it runs the file.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        resize: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`network`: (N, 3, H, W) in `dtype` -> Outputs. `resize`: as for evaluation; else the caller does that."""
        super().__init__()
        self.network, self.config = network, config
        self.resize, self.dtype = resize, dtype
        self.suppress: Suppress = suppress_by_class  # an export may put another one here

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        detect, original = self.config.detect, (images.shape[1], images.shape[2])
        x_N3HW, size, padded = self.prepare(images)
        outputs = self.network(x_N3HW)
        # Not the cached function, because the sizes may be symbols.
        anchors = torch.cat(make_anchors.__wrapped__(self.config.anchors, *padded, images.device))
        logits_NC, anchor_NC, labels_NC = _best_candidates(outputs.logits, detect.candidates)
        deltas_NC4 = _rows(torch.cat(outputs.deltas, dim=1), anchor_NC)
        boxes_NC4 = decode(deltas_NC4, anchors[anchor_NC], detect.max_ratio)
        threshold = math.log(detect.score_threshold / (1 - detect.score_threshold))
        scores_NC = torch.where(logits_NC > threshold, logits_NC.sigmoid(), 0)
        if detect.clip == "before_nms":
            boxes_NC4, scores_NC = _clip(boxes_NC4, scores_NC, size, detect)
        kept_NC = self.suppress(boxes_NC4, scores_NC, labels_NC, detect.nms_iou)
        boxes, scores, labels, count = _first(boxes_NC4, scores_NC * kept_NC, labels_NC, detect.max_detections)
        if detect.clip == "after_nms":
            boxes, scores = _clip(boxes, scores, size, detect)
            boxes, scores, labels, count = _first(boxes, scores, labels, detect.max_detections)  # without gaps
        return boxes * (_xyxy(original) / _xyxy(size)) if self.resize else boxes, scores, labels, count

    def prepare(self, images: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        """What the network takes, (height, width) of the images in it, and with their padding."""
        data = self.config.data
        if self.resize:
            size = _resized_size(images.shape[1], images.shape[2], data)
            x_N3HW = resize_and_normalize(images, size, data)
        else:
            size = images.shape[1], images.shape[2]
            x_N3HW = normalized(images.permute(0, 3, 1, 2), data)
        padded = _padded_size(size, data.pad_multiple)
        x_N3HW = F.pad(x_N3HW, (0, padded[1] - size[1], 0, padded[0] - size[0])).to(self.dtype)
        return x_N3HW.contiguous(memory_format=torch.channels_last), size, padded


def suppress_by_class(boxes_NC4: Tensor, scores_NC: Tensor, labels_NC: Tensor, iou: float) -> Tensor:
    """NMS within each class of each image, by one call; bool (N, C).

    As `batched_nms` of detect.py: an offset separates the classes, here also the images, in float64.
    """
    group_NC = labels_NC + (labels_NC.max() + 1) * torch.arange(boxes_NC4.shape[0])[:, None]
    extent = boxes_NC4.max().double() - boxes_NC4.min().double().clamp(max=0) + 1
    boxes_f64 = boxes_NC4.double() + (group_NC * extent)[:, :, None]
    index = (scores_NC.flatten() > 0).nonzero()[:, 0]
    index = index[nms(boxes_f64.flatten(0, 1)[index], scores_NC.flatten()[index].double(), iou)]
    kept = torch.zeros_like(scores_NC, dtype=torch.bool).flatten()
    return kept.index_fill(0, index, True).reshape(scores_NC.shape)


def _best_candidates(logits: list[Tensor], candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logits of each level, their anchors (counted over all levels) and classes; each (N, C).

    As `_best_candidates` of detect.py: the best pairs of an anchor and a class belong to as many anchors at most, those
    with the largest maximum over the classes.
    """
    best_logits, best_anchors, best_labels, start = [], [], [], 0
    for logits_NRK in logits:
        rows, classes = logits_NRK.shape[1], logits_NRK.shape[2]
        anchor_NA = logits_NRK.amax(dim=2).topk(torch.sym_min(candidates, rows)).indices
        logits_NAK = _rows(logits_NRK, anchor_NA)
        pairs = anchor_NA.shape[1] * classes
        logits_NC, pair_NC = logits_NAK.flatten(1).topk(torch.sym_min(candidates, pairs))
        best_logits.append(logits_NC.float())
        best_anchors.append(start + anchor_NA.gather(1, pair_NC // classes))
        best_labels.append(pair_NC % classes)
        start = start + rows
    return torch.cat(best_logits, dim=1), torch.cat(best_anchors, dim=1), torch.cat(best_labels, dim=1)


def _clip(boxes_NC4: Tensor, scores_NC: Tensor, size: tuple[int, int], config: Detect) -> tuple[Tensor, Tensor]:
    """Boxes inside the image; the score of those without area is 0, if the config says so."""
    boxes_NC4 = torch.minimum(boxes_NC4.clamp(min=0), _xyxy(size))
    if config.empty_boxes == "drop":
        scores_NC = torch.where((boxes_NC4[:, :, 2:] > boxes_NC4[:, :, :2]).all(dim=2), scores_NC, 0)
    return boxes_NC4, scores_NC


def _rows(x_NRV: Tensor, index_NC: Tensor) -> Tensor:
    """The rows of each image that `index_NC` names; (N, C, V)."""
    return x_NRV.gather(1, index_NC[:, :, None].expand(-1, -1, x_NRV.shape[2]))


def _first(
    boxes_NC4: Tensor, scores_NC: Tensor, labels_NC: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `count` highest scores above 0 with their boxes and labels, and how many there are."""
    scores_ND, index_ND = F.pad(scores_NC, (0, count)).topk(count)  # small images have fewer candidates
    index_ND = index_ND.clamp(max=scores_NC.shape[1] - 1)
    is_found_ND = scores_ND > 0
    boxes_ND4 = _rows(boxes_NC4, index_ND) * is_found_ND[:, :, None]
    labels_ND = torch.where(is_found_ND, labels_NC.gather(1, index_ND), -1)
    return boxes_ND4, scores_ND, labels_ND, is_found_ND.sum(dim=1)


def _resized_size(height: int, width: int, data: Data) -> tuple[int, int]:
    if isinstance(height, int) and isinstance(width, int):
        return resized_size(height, width, data.eval_short_side or data.short_side[-1], data)
    return output_size(height, width, data)


def _padded_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The next multiples; as new symbols if they are symbols.

    Of an expression of the input's symbols the export assumes that no branch goes another way than with the example.
    Of a new symbol it assumes nothing.
    """
    rows, columns = ((side + multiple - 1) // multiple for side in size)
    if not isinstance(rows, int) or not isinstance(columns, int):
        rows, columns = torch.stack([torch.scalar_tensor(n, dtype=torch.int64) for n in (rows, columns)]).tolist()
        torch._check(rows >= 1)
        torch._check(columns >= 1)
    return rows * multiple, columns * multiple


def _xyxy(size: tuple[int, int]) -> Tensor:
    """(width, height, width, height); float32."""
    return torch.stack([torch.scalar_tensor(side) for side in (size[1], size[0], size[1], size[0])])
