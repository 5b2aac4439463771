"""Matching on CUDA: every anchor is compared with its image's boxes and keeps the best; no IoU matrix is ever stored.

Two kernels run over the whole batch. The first finds for each box the largest IoU that any anchor has with it (for the
low-quality matches): each program writes the maximum over its anchors, so the result does not depend on the order of
the programs. The second finds each anchor's best box and whether the anchor is the best one of some box, and writes
label and box. The anchors of a program are neighbors, so most boxes overlap none of them: one comparison with their
bounding box skips such a box.

The IoU is computed operation by operation as on the CPU (no fused multiply-add, IEEE division). So ties and values on a
threshold give the same result, and the labels are exactly equal. The host never waits.

N images, R anchors, T boxes of the whole batch, U ignore regions, B blocks of anchors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retina import config as cfg
from retina.data.batch import Target

BLOCK, WARPS = 512, 4


@triton.jit
def _load_anchors(at, inside):
    """Corners and area; a unit square beyond the last anchor."""
    x1, y1 = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    x2, y2 = tl.load(at + 2, mask=inside, other=1.0), tl.load(at + 3, mask=inside, other=1.0)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit
def _bounding_box(x1, y1, x2, y2, inside):
    """Smallest box around the anchors of a block."""
    left, top = tl.min(tl.where(inside, x1, float("inf"))), tl.min(tl.where(inside, y1, float("inf")))
    right, bottom = tl.max(tl.where(inside, x2, float("-inf"))), tl.max(tl.where(inside, y2, float("-inf")))
    return left, top, right, bottom


@triton.jit
def _intersection(x1, y1, x2, y2, box):
    width = tl.maximum(tl.minimum(x2, tl.load(box + 2)) - tl.maximum(x1, tl.load(box)), 0.0)
    height = tl.maximum(tl.minimum(y2, tl.load(box + 3)) - tl.maximum(y1, tl.load(box + 1)), 0.0)
    return width * height


@triton.jit
def _iou(x1, y1, x2, y2, area, box):
    box_area = (tl.load(box + 2) - tl.load(box)) * (tl.load(box + 3) - tl.load(box + 1))
    inter = _intersection(x1, y1, x2, y2, box)
    return tl.div_rn(inter, box_area + area - inter)


@triton.jit
def _overlaps(left, top, right, bottom, box):
    across = (tl.load(box) < right) & (tl.load(box + 2) > left)
    return across & (tl.load(box + 1) < bottom) & (tl.load(box + 3) > top)


@triton.jit
def _is_outside(x1, y1, x2, y2, image):
    """Whether the center of an anchor is outside of the image."""
    return ((x1 + x2) / 2 >= tl.load(image + 5)) | ((y1 + y2) / 2 >= tl.load(image + 4))


@triton.jit
def _best_iou_kernel(anchors, boxes, images, best_BT, R, T, PADDING_IS_IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    block, image = tl.program_id(0), images + 6 * tl.program_id(1)
    r = block * BLOCK + tl.arange(0, BLOCK)
    inside = r < R
    x1, y1, x2, y2, area = _load_anchors(anchors + 4 * r, inside)
    left, top, right, bottom = _bounding_box(x1, y1, x2, y2, inside)
    if PADDING_IS_IGNORED:
        inside &= ~_is_outside(x1, y1, x2, y2, image)
    for m in range(tl.load(image), tl.load(image + 1)):
        box = boxes + 4 * m
        if _overlaps(left, top, right, bottom, box):
            iou = _iou(x1, y1, x2, y2, area, box)
            tl.store(best_BT + block.to(tl.int64) * T + m, tl.max(tl.where(inside, iou, 0.0)))


@triton.jit
def _match_kernel(
    anchors, boxes, labels, ignores, images, best_T, label_NR, box_NR4, R, num_classes, positive_iou, negative_iou,
    LOW_QUALITY: tl.constexpr, OVERWRITE: tl.constexpr, PADDING_IS_IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, n = tl.program_id(0), tl.program_id(1)
    image = images + 6 * n
    r = block * BLOCK + tl.arange(0, BLOCK)
    inside = r < R
    x1, y1, x2, y2, area = _load_anchors(anchors + 4 * r, inside)
    left, top, right, bottom = _bounding_box(x1, y1, x2, y2, inside)
    outside = r < 0
    if PADDING_IS_IGNORED:
        outside = _is_outside(x1, y1, x2, y2, image)

    best = tl.zeros((BLOCK,), tl.float32)
    has_boxes = tl.load(image) < tl.load(image + 1)
    match = tl.zeros((BLOCK,), tl.int32) + tl.where(has_boxes, tl.load(image), -1)  # torch.max of zeros is the first
    best_of = tl.zeros((BLOCK,), tl.int32) - 1  # the box whose best anchor this is; the last one, if several
    for m in range(tl.load(image), tl.load(image + 1)):
        box = boxes + 4 * m
        if _overlaps(left, top, right, bottom, box):
            iou = tl.where(outside, 0.0, _iou(x1, y1, x2, y2, area, box))
            match = tl.where(iou > best, m, match)  # the first of equals, as torch.max
            best = tl.maximum(iou, best)
            if LOW_QUALITY:
                best_of = tl.where((iou == tl.load(best_T + m)) & (iou > 0.0), m, best_of)

    label = tl.zeros((BLOCK,), tl.int32) + num_classes
    for u in range(tl.load(image + 2), tl.load(image + 3)):
        region = ignores + 4 * u
        if _overlaps(left, top, right, bottom, region):
            fraction = tl.div_rn(_intersection(x1, y1, x2, y2, region), area)
            label = tl.where(fraction >= 0.5, -1, label)
    label = tl.where((match >= 0) & (best >= negative_iou) & (best < positive_iou), -1, label)
    is_positive = (best >= positive_iou) & (match >= 0)
    if LOW_QUALITY:
        is_positive |= best_of >= 0
    if OVERWRITE:
        match = tl.where(best_of >= 0, best_of, match)
    matched = inside & is_positive & ~outside
    label = tl.where(matched, tl.load(labels + match, mask=matched, other=0).to(tl.int32), label)
    label = tl.where(outside, -1, label)
    at = n.to(tl.int64) * R + r
    tl.store(label_NR + at, label.to(label_NR.dtype.element_ty), mask=inside)
    for side in tl.static_range(4):
        value = tl.load(boxes + 4 * match + side, mask=matched, other=0.0)
        tl.store(box_NR4 + 4 * at + side, value, mask=inside)


def match(
    anchors_R4: Tensor,
    targets: list[Target],
    sizes: list[tuple[int, int]],
    num_classes: int,
    config: cfg.Assign,
) -> tuple[Tensor, Tensor]:
    """Labels int16 (N, R) and matched boxes float32 (N, R, 4), zeros where there is none; as `retina.assign.assign`.

    `sizes` are those that `assign` has rounded.
    """
    device, rows = anchors_R4.device, len(anchors_R4)
    boxes_T4 = torch.cat([target.boxes for target in targets]).contiguous()
    labels_T = torch.cat([target.labels for target in targets])
    ignores_U4 = torch.cat([target.ignore for target in targets]).contiguous()
    images_N6 = _image_table(targets, sizes).to(device, non_blocking=True)
    blocks = triton.cdiv(rows, BLOCK)
    grid = (blocks, len(targets))
    padding_is_ignored = config.padding == "ignore"
    exact = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
    best_T = boxes_T4.new_empty(0)
    low_quality = config.low_quality != "none"
    if low_quality and len(boxes_T4):
        best_BT = boxes_T4.new_zeros(blocks, len(boxes_T4))
        with torch.cuda.device_of(anchors_R4):
            _best_iou_kernel[grid](
                anchors_R4, boxes_T4, images_N6, best_BT, rows, len(boxes_T4), PADDING_IS_IGNORED=padding_is_ignored,
                **exact,
            )  # fmt: skip
        best_T = best_BT.amax(dim=0)
    labels_NR = torch.empty(len(targets), rows, dtype=torch.int16, device=device)
    boxes_NR4 = anchors_R4.new_empty(len(targets), rows, 4)
    with torch.cuda.device_of(anchors_R4):
        _match_kernel[grid](
            anchors_R4, boxes_T4, labels_T, ignores_U4, images_N6, best_T, labels_NR, boxes_NR4, rows, num_classes,
            config.positive_iou, config.negative_iou,
            LOW_QUALITY=low_quality, OVERWRITE=config.low_quality == "overwrite",
            PADDING_IS_IGNORED=padding_is_ignored,
            **exact,
        )  # fmt: skip
    return labels_NR, boxes_NR4


def _image_table(targets: list[Target], sizes: list[tuple[int, int]]) -> Tensor:
    """int32 (N, 6): where its boxes and its ignore regions begin and end, height, width; all known to the host."""
    rows, box, region = [], 0, 0
    for target, (height, width) in zip(targets, sizes, strict=True):
        after_box, after_region = box + len(target.boxes), region + len(target.ignore)
        rows.append((box, after_box, region, after_region, height, width))
        box, region = after_box, after_region
    images_N6 = torch.tensor(rows, dtype=torch.int32).reshape(-1, 6)
    return images_N6.pin_memory() if torch.cuda.is_available() else images_N6
