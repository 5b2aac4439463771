"""Detection of a whole batch compared with that of image by image, and the NMS kernel with torchvision's NMS.

The kernel runs on a GPU, or in Triton's interpreter without one.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms as torchvisions_batched_nms

from retina.config import Anchors, Detect
from retina.detect import Detections, _clip_each, _detect_batch, _detect_image, batched_nms, detect, start_detection
from retina.model.anchors import make_anchors
from retina.model.retinanet import Outputs

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it comes with torch for CUDA on Linux)", allow_module_level=True)

from retina import detect_triton
from retina.losses import nms_triton

# Of the interpreter, for the IoU of two boxes without area.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
HEIGHT, WIDTH = 64, 96
SIZES = [(64, 96), (50, 96), (33, 41)]


def kept_by_kernel(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, most: int) -> list[list[int]]:
    """Indices of the boxes that the kernel keeps, for each image of a batch."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    count = (scores > 0).sum(dim=1, dtype=torch.int32)
    sorted_boxes = boxes.take_along_dim(order[:, :, None], dim=1).to(DEVICE)
    keep, found = nms_triton.nms(sorted_boxes, labels.gather(1, order).to(DEVICE), count.to(DEVICE), iou, most)
    assert keep.shape == (len(boxes), most) and keep.dtype == torch.int64 and found.dtype == torch.int32
    return [row[places[:n]].tolist() for row, places, n in zip(order, keep.cpu(), found.tolist(), strict=True)]


def difficult_boxes(count: int) -> Tensor:
    """Boxes of five images, with corners at whole pixels: many are equal, or have an IoU of exactly 1/2 or 1/3."""
    corner, side = torch.randint(0, 40, (5, count, 2)), torch.randint(1, 25, (5, count, 2))  # image 0 remains like this
    corner[1], side[1] = corner[1] // 10, 20 + side[1] // 10  # a crowd: nearly all remove each other
    corner[2], side[2] = corner[2] // 20 * 30, 12  # equal to others, or far away
    corner[3], side[3] = corner[3] // 8, side[3] // 8  # many have no area
    corner[4], side[4] = corner[4] // 20 * 12, 12 // torch.randint(1, 4, (count, 2))  # wholes, halves and thirds
    return torch.cat([corner, corner + side], dim=2).float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "iou", "most"), [(1, 0.5, 20), (1, 0.3, 90), (3, 0.0, 90), (3, 0.5, 90), (3, 1.0, 50), (80, 0.5, 90)]
)
def test_kernel_keeps_the_boxes_that_torchvision_keeps(
    classes: int, iou: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nms_triton, "BLOCK", 32)  # so that there are several blocks
    torch.manual_seed(classes)
    boxes, labels = difficult_boxes(80), torch.randint(classes, (5, 80))
    scores = torch.randint(1, 30, (5, 80)) / 32  # many are equal
    scores[2, torch.randperm(80)[:23]] = 0  # these are not candidates
    for image, kept in enumerate(kept_by_kernel(boxes, scores, labels, iou, most)):
        valid = (scores[image] > 0).nonzero()[:, 0]
        expected = valid[batched_nms(boxes[image, valid], scores[image, valid], labels[image, valid], iou)]
        assert kept == expected[:most].tolist()


@pytest.mark.slow
def test_kernel_keeps_the_boxes_that_torchvision_keeps_of_many() -> None:
    """As many as a detector has, in blocks of the usual size; coordinates and scores are no round numbers."""
    torch.manual_seed(0)
    corner = torch.rand(2, 2200, 2) * 700
    boxes = torch.cat([corner, corner + 1 + torch.rand(2, 2200, 2) * 100], dim=2)
    boxes[1] = boxes[1] % 80 + torch.tensor([0.0, 0.0, 80.0, 80.0])  # a crowd: few are kept of each class
    scores, labels = torch.rand(2, 2200), torch.randint(20, (2, 2200))
    for image, kept in enumerate(kept_by_kernel(boxes, scores, labels, 0.5, 60)):
        expected = torchvisions_batched_nms(boxes[image], scores[image], labels[image], 0.5)
        assert kept == expected[:60].tolist()


def test_kernel_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5], [3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 10, 3]])
    labels = torch.tensor([0, 0, 1, 0, 0, 0])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])

    def kept(iou: float, most: int = 6) -> list[int]:
        return kept_by_kernel(boxes[None], scores[None], labels[None], iou, most)[0]

    assert kept(0.6) == [0, 1, 2, 3, 4, 5] and kept(0.5999) == [0, 1, 2, 3, 4]  # IoU of 1 and 5: 0.6
    assert kept(0.5) == [0, 1, 2, 3, 4]  # IoU of 0 and 1: 0.5, which is not above the threshold
    assert kept(0.4999) == [0, 2, 3, 4, 5]  # IoU of 0 and 5: 0.3; box 1, which is removed, removes none
    assert kept(0.3) == [0, 2, 3, 4, 5] and kept(0.2999) == [0, 2, 3, 4]
    assert kept(0.4999, most=2) == [0, 2] and kept(0.4999, most=1) == [0]
    assert kept_by_kernel(boxes[None], torch.zeros(1, 6), labels[None], 0.5, 6) == [[]]


def values_with_one_sigmoid() -> Tensor:
    """Logits that every dtype represents, and whose scores on the CPU do not depend on the place in a tensor.

    The last elements of a tensor are computed there in another way, which may round differently.
    """
    values = torch.arange(-36, 13) / 4
    return values[values.sigmoid() == torch.stack([value.sigmoid() for value in values])]


def network_outputs(dtype: torch.dtype, classes: int, distinct: bool, device: torch.device = CPU) -> Outputs:
    """Of three images. The logits are between -9 and 3, in float32 all different with `distinct`, else many equal."""
    torch.manual_seed(classes)
    rows = [len(level) for level in make_anchors(Anchors(), HEIGHT, WIDTH, CPU)]
    count = len(SIZES) * sum(rows) * classes
    repeated = values_with_one_sigmoid()
    chosen = torch.linspace(-9, 3, count)[torch.randperm(count)]
    if not distinct:
        chosen = repeated[torch.randint(len(repeated), (count,))]
    logits = chosen.reshape(len(SIZES), sum(rows), classes).to(device, dtype).split(rows, dim=1)
    deltas = (torch.randn(len(SIZES), sum(rows), 4) * 0.5).to(device, dtype).split(rows, dim=1)
    return Outputs(list(logits), list(deltas))


def compare_with_cpu(outputs: Outputs, config: Detect, by_detect: bool = False) -> list[Detections]:
    """The detections of the batch, which must be those of image by image on the CPU."""
    on_device = Outputs(*([level.to(DEVICE) for level in part] for part in outputs))
    anchors = make_anchors(Anchors(), HEIGHT, WIDTH, CPU)
    anchors_on_device = tuple(level.to(DEVICE) for level in anchors)
    if by_detect:
        found = detect(on_device, anchors_on_device, SIZES, config)
    else:
        boxes, scores, labels, counts = (x.cpu() for x in _detect_batch(on_device, anchors_on_device, SIZES, config))
        assert boxes.shape == (3, config.max_detections, 4) and counts.dtype == torch.int32
        found = [Detections(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(counts.tolist())]
        found = _clip_each(found, SIZES, config) if config.clip == "after_nms" else found
    for image, (size, given) in enumerate(zip(SIZES, found, strict=True)):
        logits, deltas = ([level[image] for level in part] for part in outputs)
        expected = _detect_image(logits, deltas, anchors, size, config)
        assert [x.dtype for x in given] == [x.dtype for x in expected]
        assert given.labels.tolist() == expected.labels.tolist()
        torch.testing.assert_close(given.scores.cpu(), expected.scores, rtol=1e-6, atol=0)
        torch.testing.assert_close(given.boxes.cpu(), expected.boxes, rtol=1e-5, atol=1e-4)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 7])
def test_batch_has_the_detections_of_its_images(dtype: torch.dtype, classes: int) -> None:
    if dtype == torch.float32:  # more candidates than are taken: no two may be equal, or the choice would be open
        for candidates in (3, 40):
            found = compare_with_cpu(network_outputs(dtype, classes, True), Detect(candidates=candidates))
            assert all(len(each.scores) > 5 for each in found)
    outputs = network_outputs(dtype, classes, distinct=False)
    for most in (1, 25):
        found = compare_with_cpu(outputs, Detect(candidates=10_000, max_detections=most))
        assert all(len(each.scores) == most for each in found)


CLIPPING = [(clip, empty) for clip in ("before_nms", "after_nms") for empty in ("keep", "drop")]


@pytest.mark.parametrize(("clip", "empty"), CLIPPING)
def test_clipping_by_hand(clip: str, empty: str) -> None:
    """Box 1 equals box 0 within the image; box 2 is outside of it."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 30], [20, 0, 30, 10], [0, 0, 5, 5]])
    outputs = Outputs([torch.tensor([[[4.0], [3], [2], [1]]])], [torch.zeros(1, 4, 4)])
    kept = {
        ("before_nms", "keep"): [4.0, 2, 1], ("before_nms", "drop"): [4.0, 1],
        ("after_nms", "keep"): [4.0, 3, 2], ("after_nms", "drop"): [4.0, 3],  # the third was dropped after the count
    }  # fmt: skip
    config = Detect(max_detections=3, clip=clip, empty_boxes=empty)
    (found,) = detect(outputs, (boxes,), [(10, 10)], config)
    torch.testing.assert_close(found.scores.logit(), torch.tensor(kept[clip, empty]))
    assert found.boxes.amax() == 10


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "empty"), CLIPPING)
def test_batch_clips_as_its_images(clip: str, empty: str) -> None:
    outputs = network_outputs(torch.float32, 7, distinct=True)
    for level in outputs.deltas:
        level[..., :2] *= 4  # many boxes are outside of the image
    config = Detect(candidates=40, max_detections=60, clip=clip, empty_boxes=empty)
    found = compare_with_cpu(outputs, config)
    areas = torch.cat([(each.boxes[:, 2:] - each.boxes[:, :2]).prod(dim=1) for each in found])
    assert (areas == 0).any() == (empty == "keep")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_thresholds(dtype: torch.dtype) -> None:
    outputs = network_outputs(dtype, 2, distinct=False)
    outputs.logits[0][0, 5, 1] = 30.0  # the score is 1
    outputs.logits[4][1] = -120.0  # the score is 0 in float32, but above the lowest threshold
    for threshold in (1e-300, 1e-60, 0.95, 0.96, 0.999999, 1 - 2**-53):
        compare_with_cpu(outputs, Detect(score_threshold=threshold, candidates=10_000, max_detections=30))
    outputs = Outputs([level.clamp(max=-4) for level in outputs.logits], outputs.deltas)
    assert [len(x.scores) for x in compare_with_cpu(outputs, Detect(score_threshold=0.5))] == [0, 0, 0]
    for level in outputs.logits:
        level[0] = -4.0
    found = compare_with_cpu(outputs, Detect(score_threshold=0.5, candidates=1, max_detections=1))
    assert [x.boxes.shape for x in found] == [(0, 4)] * 3


@pytest.mark.slow
def test_logits_are_compared_with_the_threshold_in_their_own_dtype() -> None:
    """The logit of 0.05 lies between two bfloat16 numbers: whether the nearer one is above it must not change."""
    outputs = network_outputs(torch.bfloat16, 2, distinct=False)
    around = torch.tensor([-2.953125, -2.9375], dtype=torch.bfloat16)
    outputs = Outputs([around[torch.randint(2, x.shape)] for x in outputs.logits], outputs.deltas)
    compare_with_cpu(outputs, Detect(score_threshold=0.05, candidates=10_000, max_detections=30))


def test_no_images() -> None:
    outputs = Outputs(*([level[:0] for level in part] for part in network_outputs(torch.float32, 2, True, DEVICE)))
    anchors = make_anchors(Anchors(), HEIGHT, WIDTH, DEVICE)
    assert detect(outputs, anchors, [], Detect()) == []


@pytest.mark.parametrize("sizes", [[], SIZES[:2], SIZES * 2])
def test_another_number_of_sizes_than_of_images(sizes: list[tuple[int, int]]) -> None:
    outputs = network_outputs(torch.float32, 2, True, DEVICE)
    with pytest.raises(ValueError, match=f"sizes: given {len(sizes)} for 3 images, expected .height, width. of each"):
        detect(outputs, make_anchors(Anchors(), HEIGHT, WIDTH, DEVICE), sizes, Detect())


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_detections_on_cuda_equal_those_on_the_cpu(dtype: torch.dtype) -> None:
    distinct = dtype == torch.float32
    outputs = network_outputs(dtype, 80, distinct)
    for clip, empty in CLIPPING:
        config = Detect(candidates=300 if distinct else 1_000_000, clip=clip, empty_boxes=empty)
        found = compare_with_cpu(outputs, config, by_detect=True)
        fewest = 40 if (clip, empty) == ("after_nms", "drop") else 90  # empty boxes are then dropped after the count
        assert all(len(each.scores) > fewest and not each.boxes.is_cuda for each in found)


@needs_cuda
def test_starting_a_detection_does_not_wait() -> None:
    outputs = network_outputs(torch.bfloat16, 80, distinct=False, device=DEVICE)
    anchors = make_anchors(Anchors(), HEIGHT, WIDTH, DEVICE)
    expected = detect(outputs, anchors, SIZES, Detect())  # compiles the kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        finish = start_detection(outputs, anchors, SIZES, Detect())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(expected, finish(), strict=True):  # and the same bits
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("classes", [1, 3, 80, 91, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_maximum_over_classes(classes: int, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 75, classes, device=DEVICE).to(dtype)
    logits[0, 3], logits[1, -1, -1] = float("-inf"), 1000
    assert torch.equal(detect_triton.max_over_classes(logits), logits.amax(dim=2))
    strided = logits.transpose(0, 1)
    assert torch.equal(detect_triton.max_over_classes(strided), strided.amax(dim=2))
    assert detect_triton.max_over_classes(logits[:, :0]).shape == (2, 0)
