from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retina.assign import assign
from retina.config import Anchors, Assign
from retina.data.batch import Target
from retina.model.anchors import make_anchors

CPU = torch.device("cpu")
NONE = torch.zeros(0, 4)


def target(boxes: Tensor, labels: list[int] | None = None, ignore: Tensor = NONE) -> Target:
    return Target(boxes, torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), ignore)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("low_quality", ["keep", "none"])
def test_labels_equal_torchvisions(seed: int, low_quality: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchors = make_anchors(Anchors(), 128, 160, CPU)
    corner = torch.rand(12, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 3 + torch.rand(12, 2, generator=generator) * 90], dim=1)
    boxes[5] = boxes[4]  # a tie
    labels = torch.randint(0, 9, (12,), generator=generator)
    assignment = assign(anchors, [Target(boxes, labels, NONE)], [(128, 160)], 9, Assign(low_quality=low_quality))
    matched = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality == "keep")(box_iou(boxes, torch.cat(anchors)))
    expected = torch.where(matched >= 0, labels[matched.clamp(min=0)], torch.where(matched == -1, 9, -1))
    assert torch.equal(assignment.labels_NR[0], expected)
    assert torch.equal(assignment.boxes_NR4[0][matched >= 0], boxes[matched[matched >= 0]])


def test_low_quality_by_hand() -> None:
    """Box 1 lies inside anchor 0, which fits box 0 better: keep leaves it to box 0, overwrite gives it to box 1."""
    anchors = (torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 50.0, 50.0]]),)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 3.0, 3.0]])
    for mode, label in (("keep", 0), ("overwrite", 1), ("none", 0)):
        assignment = assign(anchors, [target(boxes, [0, 1])], [(64, 64)], 2, Assign(low_quality=mode))
        assert assignment.labels_NR.tolist() == [[label, 2]], mode


def test_a_box_that_overlaps_no_anchor_matches_none() -> None:
    anchors = (torch.tensor([[0.0, 0.0, 8.0, 8.0]]),)
    assignment = assign(anchors, [target(torch.tensor([[20.0, 20.0, 30.0, 30.0]]))], [(32, 32)], 1, Assign())
    assert assignment.labels_NR.tolist() == [[1]]  # torchvision and detectron2 would match every anchor here


def test_crowd_regions_padding_and_empty_images() -> None:
    anchors = (torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 50.0, 10.0]]),)
    crowd = torch.tensor([[0.0, 0.0, 5.0, 10.0], [24.0, 0.0, 60.0, 4.0]])
    assignment = assign(anchors, [target(NONE, [], crowd), target(NONE)], [(64, 64), (64, 64)], 3, Assign())
    assert assignment.labels_NR.tolist() == [[-1, 3, 3], [3, 3, 3]]  # only regions with half of an anchor count
    assignment = assign(anchors, [target(NONE)], [(64, 32)], 3, Assign(padding="ignore"))
    assert assignment.labels_NR.tolist() == [[3, 3, -1]]
    assignment = assign(anchors, [target(NONE)], [(64, 33)], 3, Assign(padding="ignore"))
    assert assignment.labels_NR.tolist() == [[3, 3, 3]]  # mmdetection's padding begins at 64
    at_the_edge = target(torch.tensor([[28.0, 0.0, 48.0, 10.0]]), [1])  # the last anchor is its best one
    assert assign(anchors, [at_the_edge], [(64, 32)], 3, Assign()).labels_NR.tolist() == [[3, 3, 1]]
    ignored = assign(anchors, [at_the_edge], [(64, 32)], 3, Assign(padding="ignore"))
    assert ignored.labels_NR.tolist() == [[3, 1, -1]]
    inside = target(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), [2], crowd)
    assert assign(anchors, [inside], [(64, 64)], 3, Assign()).labels_NR.tolist() == [[2, 3, 3]]


# The CUDA kernel, in Triton's interpreter if there is no GPU. The labels must be equal, not close.

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed here (it comes with torch for CUDA)"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEIGHT, WIDTH = (128, 160) if torch.cuda.is_available() else (64, 96)  # the interpreter is slow
LARGE = make_anchors(Anchors(), HEIGHT, WIDTH, CPU)


def edge_cases(generator: torch.Generator, count: int) -> Tensor:
    """Random boxes, and boxes that repeat, equal an anchor, have IoU exactly 1/2 with one, or overlap no anchor."""
    anchors = torch.cat(LARGE)
    corner = torch.rand(count, 2, generator=generator) * 0.95 * HEIGHT
    boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 0.7 * HEIGHT], dim=1)
    equal = anchors[torch.randint(len(anchors), (count,), generator=generator)]
    half = equal.clone()
    half[:, 2] = half[:, 0] + (half[:, 2] - half[:, 0]) / 2  # IoU 1/2 with that anchor
    kind = torch.randint(5, (count,), generator=generator)[:, None]
    boxes = torch.where(kind == 1, equal, torch.where(kind == 2, half, boxes))
    boxes = torch.where(kind == 3, boxes[:1], boxes)  # ties between boxes
    return torch.where(kind == 4, boxes + 3000, boxes)  # overlap no anchor


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("low_quality", ["keep", "overwrite", "none"])
@pytest.mark.parametrize("padding", ["negative", "ignore"])
@pytest.mark.parametrize("seed", range(3))
def test_kernel_gives_equal_labels(low_quality: str, padding: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from retina import assign_triton

    if DEVICE.type == "cpu":  # the interpreter is slow: fewer programs
        monkeypatch.setattr(assign_triton, "BLOCK", 512)
    generator = torch.Generator().manual_seed(seed)
    targets = [
        Target(edge_cases(generator, m), torch.randint(0, 9, (m,), generator=generator), edge_cases(generator, u))
        for m, u in ((11, 4), (0, 0), (1, 0), (0, 5), (40, 3))
    ]
    sizes = [(HEIGHT - 32, WIDTH - 32), (HEIGHT, WIDTH), (32, 32), (HEIGHT, WIDTH - 64), (HEIGHT, WIDTH)]
    moved = [Target(*(part.to(DEVICE) for part in target)) for target in targets]
    for positive, negative in ((0.5, 0.4), (0.6, 0.5), (0.3, 0.0), (0.0, 0.0))[: 4 if seed == 0 else 1]:
        config = Assign(low_quality=low_quality, padding=padding, positive_iou=positive, negative_iou=negative)
        expected = assign(LARGE, targets, sizes, 9, config)
        labels, boxes = assign_triton.match(torch.cat(LARGE).to(DEVICE), moved, sizes, 9, config)
        assert (expected.labels_NR >= 0).any() and (expected.labels_NR == -1).any()
        assert torch.equal(labels.cpu(), expected.labels_NR), (positive, negative)
        assert torch.equal(boxes.cpu(), expected.boxes_NR4)


@needs_triton
def test_kernel_without_boxes() -> None:
    from retina.assign_triton import match

    empty = Target(NONE.to(DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE), NONE.to(DEVICE))
    labels, boxes = match(torch.cat(LARGE).to(DEVICE), [empty, empty], [(HEIGHT, WIDTH)] * 2, 4, Assign())
    assert (labels == 4).all() and not boxes.any()


@needs_triton
def test_kernel_by_hand() -> None:
    """The same cases as in test_low_quality_by_hand."""
    from retina.assign_triton import match

    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 50.0, 50.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 3.0, 3.0]])
    on_device = Target(boxes.to(DEVICE), torch.tensor([0, 1], device=DEVICE), NONE.to(DEVICE))
    for mode, label in (("keep", 0), ("overwrite", 1), ("none", 0)):
        labels, matched = match(anchors.to(DEVICE), [on_device], [(64, 64)], 2, Assign(low_quality=mode))
        assert labels.tolist() == [[label, 2]] and matched[0, 0].tolist() == boxes[label].tolist(), mode


def test_more_classes_than_int16_labels_allow() -> None:
    with pytest.raises(ValueError, match="num_classes: given 40000, expected at most 32767"):
        assign(LARGE, [target(NONE)], [(HEIGHT, WIDTH)], 40000, Assign())


TWO = torch.tensor([[0.0, 0.0, 10.0, 9.0], [40.0, 40.0, 50.0, 50.0]])
IDS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (target(TWO, [1, 3]), ValueError, r"targets\[1\]: class id 3 of box 1, expected 0\.\.2; subtract 1 if"),
        (target(TWO, [-1, 0]), ValueError, r"targets\[1\]: class id -1 of box 0, expected 0\.\.2; .* into `ignore`"),
        (target(TWO, [0, 65536]), ValueError, "class id 65536 of box 1"),  # 0 as int16
        (Target(TWO, torch.tensor([0, 255], dtype=torch.uint8), NONE), ValueError, "class id 255 of box 1"),
        (target(TWO, [0, 1, 2]), ValueError, r"targets\[1\]: given boxes \(2, 4\), labels \(3,\) of torch\.int64"),
        (Target(TWO, IDS.float(), NONE), ValueError, r"labels \(2,\) of torch\.float32 .* labels \(M,\) of integers"),
        (Target(TWO, IDS.bool(), NONE), ValueError, r"labels \(2,\) of torch\.bool"),
        (Target(TWO[0], IDS[0], NONE), ValueError, r"given boxes \(4,\), labels \(\) of torch\.int64"),
        (Target(TWO, IDS, torch.zeros(4)), ValueError, r"ignore \(4,\); expected .* and ignore \(I, 4\)"),
        (Target(TWO / torch.tensor([[1.0], [0.0]]), IDS, NONE), ValueError, r"targets\[1\]: a box .* is not finite"),
        ({"boxes": TWO, "labels": IDS}, TypeError, r"targets\[1\]: given dict, expected retina\.data\.batch\.Target\("),
        ([TWO, IDS, NONE], TypeError, r"targets\[1\]: given list, expected"),
        (Target(TWO.tolist(), IDS, NONE), TypeError, r"targets\[1\]: given \['list', 'Tensor', 'Tensor'\], expected"),
    ],
)  # fmt: skip
def test_a_wrong_target_is_named(wrong: Target, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        assign(LARGE, [target(TWO), wrong], [(HEIGHT, WIDTH)] * 2, 3, Assign())


def test_no_objects_however_they_are_written() -> None:
    expected = assign(LARGE, [target(NONE, [])], [(HEIGHT, WIDTH)], 3, Assign())
    empty = torch.tensor([])  # float32, one dimension
    for given in (Target(empty, empty, empty), (NONE, empty, NONE), Target(NONE, empty.int(), empty)):
        found = assign(LARGE, [given], [(HEIGHT, WIDTH)], 3, Assign())
        assert torch.equal(found.labels_NR, expected.labels_NR) and not found.boxes_NR4.any()


def test_the_numbers_of_targets_and_sizes() -> None:
    for targets, sizes in ((0, 0), (2, 1)):
        with pytest.raises(ValueError, match=f"given {targets} targets and {sizes} sizes, expected one of each"):
            assign(LARGE, [target(TWO)] * targets, [(HEIGHT, WIDTH)] * sizes, 3, Assign())


def test_matched_boxes_have_the_dtype_of_the_anchors() -> None:
    expected = assign(LARGE, [target(TWO, None, TWO + 20)], [(HEIGHT, WIDTH)], 3, Assign())
    given = assign(LARGE, [target(TWO.double(), None, (TWO + 20).double())], [(HEIGHT, WIDTH)], 3, Assign())
    assert (expected.labels_NR == 0).any() and given.boxes_NR4.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
