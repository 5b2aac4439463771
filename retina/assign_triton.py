"""Matching on CUDA: every anchor is compared with its image's boxes and keeps the best; no IoU matrix is ever stored.

One kernel runs over the whole batch, once or twice. The anchors of a block are neighbors, so most boxes overlap none of
them: 32 boxes at a time are compared with the bounding box of the block, and only those that overlap it are visited.
The first run gives each anchor the label and the box of its best match, and writes the largest IoU of each block with
each box. Low-quality matches need the largest IoU of a box over all blocks. So a second run repeats those blocks that
have a best anchor of some box; they are few.

The IoU is computed operation by operation as on the CPU (no fused multiply-add, IEEE division). So ties and values on a
threshold give the same result, and the labels are exactly equal, for finite boxes. The host never waits.

N images, R anchors, T boxes of the whole batch, U ignore regions, B blocks of anchors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retina import config as cfg
from retina.data.batch import Target

BLOCK, WARPS = 128, 2


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
def _overlapping(left, top, right, bottom, boxes, at, end):
    """Bit i is set if box `at` + i, before `end`, overlaps the bounding box; of 32 boxes."""
    lane = tl.arange(0, 32)
    box, inside = boxes + 4 * (at + lane), at + lane < end
    across = (tl.load(box, mask=inside, other=float("inf")) < right) & (tl.load(box + 2, mask=inside, other=0.0) > left)
    down = (tl.load(box + 1, mask=inside, other=0.0) < bottom) & (tl.load(box + 3, mask=inside, other=0.0) > top)
    return tl.reduce_or(tl.where(across & down, 1 << lane, 0), 0)


@triton.jit
def _first_bit(bits):
    """The position of the lowest 1: the exponent of that power of two as a float."""
    power = (bits & -bits).to(tl.uint32).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _is_outside(x1, y1, x2, y2, image):
    """Whether the center of an anchor is outside of the image."""
    return ((x1 + x2) / 2 >= tl.load(image + 5)) | ((y1 + y2) / 2 >= tl.load(image + 4))


@triton.jit
def _has_best_anchor(best_T, best_BT, begin, end):
    """Whether the block of the row `best_BT` has a best anchor of one of the boxes from `begin` to `end`."""
    found = 0
    for at in range(begin, end, 32):
        m = at + tl.arange(0, 32)
        best = tl.load(best_T + m, mask=m < end, other=0.0)
        is_best = (tl.load(best_BT + m, mask=m < end, other=-1.0) == best) & (best > 0.0)
        found |= tl.max(is_best.to(tl.int32), 0)
    return found != 0


@triton.jit
def _match_block(
    anchors, boxes, labels, ignores, image, best_T, best_BT, label_NR, box_NR4, block, R, num_classes,
    positive_iou, negative_iou,
    LOW_QUALITY: tl.constexpr, OVERWRITE: tl.constexpr, STORES_BEST: tl.constexpr, PADDING_IS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = block * BLOCK + tl.arange(0, BLOCK)
    inside = r < R
    x1, y1, x2, y2, area = _load_anchors(anchors + 4 * r, inside)
    left, top, right, bottom = _bounding_box(x1, y1, x2, y2, inside)
    ignored = r >= R
    if PADDING_IS_IGNORED:
        ignored |= _is_outside(x1, y1, x2, y2, image)
    begin, end = tl.load(image), tl.load(image + 1)
    best = tl.zeros((BLOCK,), tl.float32)
    match = tl.zeros((BLOCK,), tl.int32) + tl.where(begin < end, begin, -1)  # torch.max of zeros is the first
    best_of = tl.zeros((BLOCK,), tl.int32) - 1  # the box whose best anchor this is; the last one, if several
    lane = tl.arange(0, 32)
    for at in range(begin, end, 32):
        best_of_block = tl.zeros((32,), tl.float32)
        bits = _overlapping(left, top, right, bottom, boxes, at, end)
        while bits != 0:
            m = at + _first_bit(bits)
            bits &= bits - 1
            iou = tl.where(ignored, 0.0, _iou(x1, y1, x2, y2, area, boxes + 4 * m))
            match = tl.where(iou > best, m, match)  # the first of equals, as torch.max
            best = tl.maximum(iou, best)
            if LOW_QUALITY:
                best_of = tl.where((iou == tl.load(best_T + m)) & (iou > 0.0), m, best_of)
            if STORES_BEST:  # as an integer, which orders like the float and is reduced faster
                largest = tl.max(iou.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
                best_of_block = tl.where(lane == m - at, largest, best_of_block)
        if STORES_BEST:
            tl.store(best_BT + at + lane, best_of_block, mask=at + lane < end)

    label = tl.zeros((BLOCK,), tl.int32) + num_classes
    end = tl.load(image + 3)
    for at in range(tl.load(image + 2), end, 32):
        bits = _overlapping(left, top, right, bottom, ignores, at, end)
        while bits != 0:
            region = ignores + 4 * (at + _first_bit(bits))
            bits &= bits - 1
            label = tl.where(tl.div_rn(_intersection(x1, y1, x2, y2, region), area) >= 0.5, -1, label)
    label = tl.where((match >= 0) & (best >= negative_iou) & (best < positive_iou), -1, label)
    is_positive = (best >= positive_iou) & (match >= 0)
    if LOW_QUALITY:
        is_positive |= best_of >= 0
    if OVERWRITE:
        match = tl.where(best_of >= 0, best_of, match)
    matched = is_positive & ~ignored
    label = tl.where(matched, tl.load(labels + match, mask=matched, other=0).to(tl.int32), label)
    label = tl.where(ignored, -1, label)
    tl.store(label_NR + r, label.to(label_NR.dtype.element_ty), mask=inside)
    for side in tl.static_range(4):
        value = tl.load(boxes + 4 * match + side, mask=matched, other=0.0)
        tl.store(box_NR4 + 4 * r + side, value, mask=inside)


@triton.jit
def _match_kernel(
    anchors, boxes, labels, ignores, images, best_T, best_BT, label_NR, box_NR4, R, T, num_classes,
    positive_iou, negative_iou,
    LOW_QUALITY: tl.constexpr, OVERWRITE: tl.constexpr, STORES_BEST: tl.constexpr, PADDING_IS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first run takes all blocks. The second, with LOW_QUALITY, repeats those that have a best anchor of a box."""
    block, n = tl.program_id(0), tl.program_id(1)
    image, best_BT = images + 6 * n, best_BT + block.to(tl.int64) * T
    visited = True
    if LOW_QUALITY:
        visited = _has_best_anchor(best_T, best_BT, tl.load(image), tl.load(image + 1))
    if visited:
        _match_block(
            anchors, boxes, labels, ignores, image, best_T, best_BT, label_NR + n.to(tl.int64) * R,
            box_NR4 + 4 * n.to(tl.int64) * R, block, R, num_classes, positive_iou, negative_iou,
            LOW_QUALITY, OVERWRITE, STORES_BEST, PADDING_IS_IGNORED, BLOCK,
        )  # fmt: skip


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
    boxes_T4 = torch.cat([target.boxes for target in targets])
    labels_T = torch.cat([target.labels for target in targets])
    ignores_U4 = torch.cat([target.ignore for target in targets])
    images_N6 = _image_table(targets, sizes).to(device, non_blocking=True)
    blocks = triton.cdiv(rows, BLOCK)
    labels_NR = torch.empty(len(targets), rows, dtype=torch.int16, device=device)
    boxes_NR4 = anchors_R4.new_empty(len(targets), rows, 4)
    low_quality = config.low_quality != "none" and len(boxes_T4) > 0
    best_BT = boxes_T4.new_empty(blocks if low_quality else 0, len(boxes_T4))

    def run(best_T: Tensor, second: bool) -> None:
        with torch.cuda.device_of(anchors_R4):
            _match_kernel[(blocks, len(targets))](
                anchors_R4, boxes_T4, labels_T, ignores_U4, images_N6, best_T, best_BT, labels_NR, boxes_NR4, rows,
                len(boxes_T4), num_classes, config.positive_iou, config.negative_iou,
                LOW_QUALITY=second, OVERWRITE=second and config.low_quality == "overwrite",
                STORES_BEST=low_quality and not second, PADDING_IS_IGNORED=config.padding == "ignore",
                BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip

    run(best_BT, second=False)  # any pointer will do for best_T, which is not read
    if low_quality:
        run(best_BT.amax(dim=0), second=True)
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
