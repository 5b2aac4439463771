"""The graph of the whole detector against the detector in PyTorch; BatchNorm folded into convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from export_helpers import random_config, random_detector, random_image, random_model
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retina.detect import Detections
from retina.evaluate import ImageDetections
from retina.export.network import inference_network
from retina.export.program import DetectionProgram, InputShape, suppress_by_class


@torch.inference_mode()
def run(program: DetectionProgram, *images: np.ndarray) -> list[Detections]:
    boxes, scores, labels, count = program(torch.from_numpy(np.stack(images)))
    for i, n in enumerate(count.tolist()):  # beyond the count
        assert not boxes[i, n:].any() and not scores[i, n:].any() and (labels[i, n:] == -1).all()
    return [Detections(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(count.tolist())]


def assert_equal(found: Detections, expected: ImageDetections) -> None:
    assert len(expected.scores) > 5
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-2)
    assert torch.equal(found.labels, expected.labels)


def test_input_shapes_are_described() -> None:
    assert InputShape(None, None, None).describe() == "any number of images of any size"
    assert InputShape(2, None, 64).describe() == "2 images of anyx64 px (height x width)"


@pytest.mark.parametrize("size", [(128, 160), (160, 128), (97, 191)])
@pytest.mark.parametrize(
    "setting",
    [
        "data.resize=opencv",
        "data.resize=torchvision",
        "detect.max_detections=7",
        "detect.clip=after_nms",
        "detect.empty_boxes=drop",
    ],
)
def test_detections_are_those_of_pytorch(tiny_yaml: Path, size: tuple[int, int], setting: str) -> None:
    config = random_config(tiny_yaml, setting)
    model = random_model(config)
    images = [random_image(*size, seed) for seed in (1, 2)]
    for found, image in zip(run(DetectionProgram(model, config), *images), images, strict=True):
        assert_equal(found, random_detector(config, model)(image))


def test_few_candidates_are_taken_of_each_level(tiny_yaml: Path) -> None:
    config = random_config(tiny_yaml, "detect.candidates=20")
    model = random_model(config)
    image = random_image(128, 160)
    assert_equal(run(DetectionProgram(model, config), image)[0], random_detector(config, model)(image))


def test_without_resize_the_image_is_taken_as_it_is(tiny_yaml: Path) -> None:
    config = random_config(tiny_yaml)
    model = random_model(config)
    image = random_image(64, 90)
    same_size = config.model_copy(update={"data": config.data.model_copy(update={"max_side": 90})})
    found = run(DetectionProgram(model, config, resize=False), image)
    assert_equal(found[0], random_detector(same_size, model)(image))


def test_no_detections_and_fewer_candidates_than_detections(tiny_yaml: Path) -> None:
    config = random_config(tiny_yaml, "anchors.scales=1", "anchors.ratios=[1]", "data.short_side=[16]")
    model = random_model(config)
    (found,) = run(DetectionProgram(model, config), random_image(16, 16))
    assert 0 < len(found.scores) < 30
    config = random_config(tiny_yaml, "detect.score_threshold=0.999")
    assert [len(each.scores) for each in run(DetectionProgram(model, config), random_image(64, 64))] == [0]


def test_suppression_separates_images_and_classes() -> None:
    box = torch.tensor([0.0, 0, 10, 10])
    boxes = torch.stack([box, box + 1, box, box + 1]).expand(2, 4, 4)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.0, 0.3]])
    labels = torch.tensor([[0, 0, 1, 2], [1, 1, 1, 2]])
    expected = [[True, False, True, True], [False, True, False, True]]
    assert suppress_by_class(boxes, scores, labels, 0.5).tolist() == expected


@pytest.mark.parametrize("norm", ["batch", "frozen", "frozen_stats", "group"])
@pytest.mark.parametrize("backbone", ["resnet10", "resnet50"])
def test_folding_changes_no_output(tiny_yaml: Path, norm: str, backbone: str) -> None:
    width = 32 if backbone == "resnet10" else 64
    config = random_config(
        tiny_yaml, f"model.norm={norm}", f"model.backbone={backbone}", f"model.base_channels={width}"
    )
    model = random_model(config)
    for name, buffer in model.named_buffers():
        if "running_" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    images = torch.randn(1, 3, 64, 96)

    @torch.inference_mode()
    def outputs(network: torch.nn.Module) -> list[Tensor]:
        logits, deltas = network(images)
        return [*logits, *deltas]

    folded = inference_network(model, torch.float32)
    assert not any(isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, torch.nn.Identity) for module in folded.modules()) == (norm != "group")
    for found, expected in zip(outputs(folded), outputs(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_folding_knows_other_backbones(tiny_yaml: Path) -> None:
    """A network with other names and nested blocks, in place of the ResNet."""
    model = random_model(random_config(tiny_yaml))
    model.backbone.body = torchvision.models.mobilenet_v3_small().features.eval()  # type: ignore[assignment]
    for module in model.backbone.body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    body = inference_network(model, torch.float32).backbone.body
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(body(images), model.backbone.body(images), rtol=1e-3, atol=1e-5)
