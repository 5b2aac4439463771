from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retina.assign import assign
from retina.config import Anchors, Assign
from retina.data.loader import Target
from retina.model.anchors import make_anchors

CPU = torch.device("cpu")
NONE = torch.zeros(0, 4)


def target(boxes: Tensor, labels: list[int] | None = None, ignore: Tensor = NONE) -> Target:
    return Target(boxes, torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), ignore)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("low_quality", ["keep", "none"])
def test_labels_are_torchvisions(seed: int, low_quality: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchors = make_anchors(Anchors(), 128, 160, CPU)
    corner = torch.rand(12, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 3 + torch.rand(12, 2, generator=generator) * 90], dim=1)
    boxes[5] = boxes[4]  # a tie
    labels = torch.randint(0, 9, (12,), generator=generator)
    got = assign(anchors, [Target(boxes, labels, NONE)], [(128, 160)], 9, Assign(low_quality=low_quality))
    matched = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality == "keep")(box_iou(boxes, torch.cat(anchors)))
    expected = torch.where(matched >= 0, labels[matched.clamp(min=0)], torch.where(matched == -1, 9, -1))
    assert torch.equal(got.labels_NR[0], expected)
    assert torch.equal(got.boxes_NR4[0][matched >= 0], boxes[matched[matched >= 0]])


def test_low_quality_by_hand() -> None:
    """Box 1 lies inside anchor 0, which fits box 0 better: keep leaves it to box 0, overwrite gives it to box 1."""
    anchors = (torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 50.0, 50.0]]),)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 3.0, 3.0]])
    for mode, label in (("keep", 0), ("overwrite", 1), ("none", 0)):
        got = assign(anchors, [target(boxes, [0, 1])], [(64, 64)], 2, Assign(low_quality=mode))
        assert got.labels_NR.tolist() == [[label, 2]], mode


def test_a_box_no_anchor_touches_matches_none() -> None:
    anchors = (torch.tensor([[0.0, 0.0, 8.0, 8.0]]),)
    got = assign(anchors, [target(torch.tensor([[20.0, 20.0, 30.0, 30.0]]))], [(32, 32)], 1, Assign())
    assert got.labels_NR.tolist() == [[1]]  # torchvision and detectron2 would match every anchor here


def test_crowd_padding_and_empty_images() -> None:
    anchors = (torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 50.0, 10.0]]),)
    crowd = torch.tensor([[0.0, 0.0, 5.0, 10.0], [24.0, 0.0, 60.0, 4.0]])
    got = assign(anchors, [target(NONE, [], crowd), target(NONE)], [(64, 64), (64, 64)], 3, Assign())
    assert got.labels_NR.tolist() == [[-1, 3, 3], [3, 3, 3]]  # half of the anchor's area inside one region decides
    got = assign(anchors, [target(NONE)], [(64, 35)], 3, Assign(padding="ignore"))
    assert got.labels_NR.tolist() == [[3, 3, -1]]
    inside = target(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), [2], crowd)
    assert assign(anchors, [inside], [(64, 64)], 3, Assign()).labels_NR.tolist() == [[2, 3, 3]]
