"""NMS within each class of all images of a batch, as one kernel on CUDA: of detections, and of OHEM's anchors.

One program handles an image. Its boxes are in order of falling score, so the first that remains is the next to be
kept. The program walks through them in blocks. It first removes the boxes of a block that overlap one kept from the
blocks before. Then it keeps the first of those that remain, removes what that one overlaps, and so on. Often enough
boxes are kept after the first block, and any number of candidates works.

The IoU is that of two boxes of one class in float32, operation by operation (no fused multiply-add, IEEE division), and
a box is removed if it is above the threshold, as in torchvision. A class costs no offset of the coordinates, so float32
is enough. The host never waits.

N images, C candidates of an image, M the largest number of boxes kept in an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 8


@triton.jit
def _remove(remaining, x1, y1, x2, y2, label, boxes, labels, kept, count, max_iou):
    """`remaining`, with `count` in place of the box `kept` and of those of its class that overlap it too much."""
    box = boxes + 4 * kept
    kept_x1, kept_y1, kept_x2, kept_y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    width = tl.maximum(tl.minimum(x2, kept_x2) - tl.maximum(x1, kept_x1), 0.0)
    height = tl.maximum(tl.minimum(y2, kept_y2) - tl.maximum(y1, kept_y1), 0.0)
    inter = width * height
    union = (kept_x2 - kept_x1) * (kept_y2 - kept_y1) + (x2 - x1) * (y2 - y1) - inter
    overlaps = tl.div_rn(inter, union) > max_iou  # not for two boxes without area: 0 / 0 is not above it
    is_removed = (label == tl.load(labels + kept).to(tl.int32)) & overlaps
    return tl.where(is_removed | (remaining == kept), count, remaining)


@triton.jit
def _nms_kernel(
    boxes_NC4, labels_NC, count_N, keep_NM, found_N, C, max_detections, max_iou, DROPS_EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    boxes, labels, keep = boxes_NC4 + 4 * n * C, labels_NC + n * C, keep_NM + n * max_detections
    count = tl.load(count_N + n)
    start, found = 0, 0
    while (start < count) & (found < max_detections):
        c = start + tl.arange(0, BLOCK)
        inside = c < count
        at = boxes + 4 * c
        x1, y1 = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
        x2, y2 = tl.load(at + 2, mask=inside, other=0.0), tl.load(at + 3, mask=inside, other=0.0)
        label = tl.load(labels + c, mask=inside, other=-1).to(tl.int32)
        remaining = tl.where(inside, c, count)  # its own place, or `count` for a box that is removed
        if DROPS_EMPTY:
            remaining = tl.where((x2 > x1) & (y2 > y1), remaining, count)
        for k in range(found):
            remaining = _remove(remaining, x1, y1, x2, y2, label, boxes, labels, tl.load(keep + k), count, max_iou)
        first = tl.min(remaining)
        while (first < count) & (found < max_detections):
            tl.store(keep + found, first)
            found += 1
            remaining = _remove(remaining, x1, y1, x2, y2, label, boxes, labels, first, count, max_iou)
            first = tl.min(remaining)
        tl.debug_barrier()  # all threads read in the next block what one of them stored here
        start += BLOCK
    tl.store(found_N + n, found)


def nms(
    boxes_NC4: Tensor, labels_NC: Tensor, count_N: Tensor, iou: float, max_detections: int, drops_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Greedy NMS within each class of each image, until `max_detections` boxes are kept.

    Args:
        boxes_NC4: xyxy in pixels, float32, each image's in order of falling score.
        labels_NC: class ids, int64.
        count_N: how many of its boxes each image has, int32; those after them are not looked at.
        iou: a box is removed if its IoU with a kept one is above this.
        max_detections: M.
        drops_empty: boxes without area are not kept.

    Returns: the places of the kept boxes in order, int64 (N, M), and how many they are, int32 (N,). The rest is 0.
    """
    images, candidates = labels_NC.shape
    keep_NM = labels_NC.new_zeros(images, max_detections)
    found_N = torch.zeros_like(count_N)
    with torch.cuda.device_of(boxes_NC4):
        _nms_kernel[(images,)](
            boxes_NC4.contiguous(), labels_NC.contiguous(), count_N, keep_NM, found_N, candidates, max_detections, iou,
            DROPS_EMPTY=drops_empty, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return keep_NM, found_N
