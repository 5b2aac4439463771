from __future__ import annotations

import math

import torch
from torchvision.models.detection._utils import BoxCoder

from retina.boxes import decode, encode, intersection_over_area


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 500
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 300], dim=1)


def test_encode_and_decode_equal_torchvision() -> None:
    boxes, anchors = random_boxes(200, 0), random_boxes(200, 1)
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(encode(boxes, anchors), coder.encode_single(boxes, anchors), rtol=1e-5, atol=1e-5)
    deltas = torch.randn(200, 4) * 3
    torch.testing.assert_close(
        decode(deltas, anchors, 62.5), coder.decode_single(deltas, anchors), rtol=1e-5, atol=1e-3
    )


def test_encode_by_hand() -> None:
    anchor, box = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[5.0, 0.0, 25.0, 40.0]])
    expected = torch.tensor([[1.0, 0.5, math.log(2), math.log(2)]])
    torch.testing.assert_close(encode(box, anchor), expected)


def test_decode_inverts_encode_and_clamps() -> None:
    boxes, anchors = random_boxes(100, 2), random_boxes(100, 3)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors, 1e4), boxes, rtol=1e-4, atol=1e-2)
    clamped = decode(torch.tensor([[0.0, 0.0, 50.0, 90.0]]), torch.tensor([[0.0, 0.0, 10.0, 10.0]]), 62.5)
    assert torch.isfinite(clamped).all() and abs((clamped[0, 2] - clamped[0, 0]).item() - 625) < 1e-2


def test_intersection_over_area_by_hand() -> None:
    region = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    anchors = torch.tensor([[0.0, 0.0, 5.0, 5.0], [5.0, 5.0, 15.0, 15.0], [20.0, 0.0, 30.0, 10.0]])
    torch.testing.assert_close(intersection_over_area(region, anchors), torch.tensor([[1.0, 0.25, 0.0]]))
