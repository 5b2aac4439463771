"""A part of the first section of benchmarks/gpu.py: torchvision's RetinaNet and retina on the card, with equal weights.

Logits, deltas, anchors, loss, gradients and detections, in float32 without TF32. tests/model/test_parity.py does the
same on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gpu_models import Sizes, our_model, run_measurement, spread_outputs, their_model
from gpu_report import Report
from speed import CLASSES, make_batch
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.image_list import ImageList

from retina.assign import assign
from retina.config import Config
from retina.config_file import load_config
from retina.criterion import count_positives, detection_loss, normalizer
from retina.data.batch import Batch
from retina.detect import detect
from retina.model import RetinaNet, make_anchors
from retina.model.key_tables import TORCHVISION_V1, rename_keys

CONFIG = Path(__file__).resolve().parents[1] / "configs/presets/torchvision_v1.yaml"
IMAGES = 2


def measure(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Each difference with its limit; raises AssertionError at the end if one is above it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    overrides = [f"model.backbone={sizes.backbone}", "model.weights=null", "model.norm_eps=1e-5", "model.p6_from=c5"]
    config = load_config(CONFIG, overrides)
    batch = make_batch(IMAGES, sizes.side, sizes.side, config.data.pad_multiple).to(device)
    theirs = their_model(sizes, device)
    spread_outputs(theirs, config, batch, sizes)
    ours = our_model(config, theirs, sizes, device)
    report.say(f"parity with torchvision: {sizes.backbone}, {IMAGES} x {sizes.side}x{sizes.side}, float32 without TF32")
    figures = compare_outputs(theirs.eval(), ours.eval(), batch, config)
    figures |= compare_training(theirs.train(), ours.train(), batch, config)
    above = []
    for name, (difference, limit) in figures.items():
        report.put(f"parity: {name}", difference=difference, limit=limit)
        report.say(f"  {name:44} {difference:.3g}   (at most {limit:g})")
        if not difference <= limit:
            above.append(name)
    assert not above, f"above the limit: {', '.join(above)}"


@torch.inference_mode()
def compare_outputs(
    theirs: TorchvisionRetinaNet, ours: RetinaNet, batch: Batch, config: Config
) -> dict[str, tuple[float, float]]:
    """Largest differences of the outputs, and the share of detections that the other does not have; with limits."""
    images = batch.normalized()
    features = list(theirs.backbone(images).values())
    their_outputs = theirs.head(features)
    outputs = ours(images.contiguous(memory_format=torch.channels_last))
    anchors = make_anchors(config.anchors, *images.shape[2:], images.device)
    their_anchors = theirs.anchor_generator(ImageList(images, batch.sizes), features)
    levels = [len(level) for level in anchors]
    their_detections = theirs.postprocess_detections(
        {name: list(value.split(levels, dim=1)) for name, value in their_outputs.items()},
        [list(boxes.split(levels)) for boxes in their_anchors],
        batch.sizes,
    )
    pairs = zip(detect(outputs, anchors, batch.sizes, config.detect), their_detections, strict=True)
    missing = [share_missing(detections, expected) for detections, expected in pairs]
    return {
        "logits": (largest_difference(torch.cat(outputs.logits, dim=1), their_outputs["cls_logits"]), 1e-3),
        "deltas": (largest_difference(torch.cat(outputs.deltas, dim=1), their_outputs["bbox_regression"]), 1e-3),
        "anchors": (largest_difference(torch.cat(anchors), their_anchors[0]), 0.0),
        "share of detections that the other lacks": (max(missing), 0.02),
    }


def share_missing(detections: object, expected: dict[str, Tensor]) -> float:
    """The larger share of detections of one side without an equal one of the other side."""
    boxes, scores, labels = detections  # type: ignore[misc]
    expected = {name: value.cpu() for name, value in expected.items()}
    if not len(scores) or not len(expected["scores"]):
        return 1.0  # both should have some
    same = (expected["scores"][:, None] - scores).abs() < 1e-3
    same &= (expected["boxes"][:, None] - boxes).abs().amax(dim=2) < 0.1
    same &= expected["labels"][:, None] == labels
    return 1 - min(same.any(dim=0).float().mean().item(), same.any(dim=1).float().mean().item())


def compare_training(
    theirs: TorchvisionRetinaNet, ours: RetinaNet, batch: Batch, config: Config
) -> dict[str, tuple[float, float]]:
    """Relative differences of the losses, and the largest of the gradients of all weights; with limits."""
    images = batch.normalized()
    features = list(theirs.backbone(images).values())
    gt = [{"boxes": target.boxes, "labels": target.labels} for target in batch.targets]
    their_anchors = theirs.anchor_generator(ImageList(images, batch.sizes), features)
    losses = theirs.compute_loss(gt, theirs.head(features), their_anchors)
    sum(losses.values()).backward()

    anchors = make_anchors(config.anchors, *images.shape[2:], images.device)
    assignment = assign(anchors, batch.targets, batch.sizes, CLASSES, config.assign)
    positives = count_positives(assignment, CLASSES)
    average = torch.tensor(100.0, device=images.device)
    divisor = normalizer(positives, positives.sum(), len(batch.sizes), average, config.loss.normalizer)
    outputs = ours(images.contiguous(memory_format=torch.channels_last))
    our_losses = detection_loss(outputs, anchors, assignment, divisor, config.loss, config.detect.max_ratio)
    our_losses["loss"].backward()
    given = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    gradients = rename_keys(given, TORCHVISION_V1)
    trained = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert trained.keys() == gradients.keys(), "the same stages are frozen"
    differences = [((grad - gradients[name]).norm() / gradients[name].norm()).item() for name, grad in trained.items()]
    return {
        "class loss, relative": (relative(our_losses["loss_cls"], losses["classification"]), 1e-4),
        "box loss, relative": (relative(our_losses["loss_box"], losses["bbox_regression"]), 1e-4),
        "gradient of a weight, relative, the largest": (max(differences), 1e-2),
    }


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs() / b.abs()).item()


if __name__ == "__main__":
    run_measurement(measure)
