"""Tests that need a CUDA device; skipped without one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
import torch
from detector_helpers import save_random_detector
from torch import nn

import retina
from retina.assign import assign
from retina.config import Anchors, Assign, Config, Detect, Loss
from retina.config_file import load_config
from retina.criterion import count_positives, detection_loss
from retina.data.batch import Target
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches
from retina.detect import detect
from retina.losses import sigmoid_focal_loss
from retina.model import checkpoint
from retina.model.anchors import make_anchors
from retina.model.backbone import FrozenBatchNorm2d, FrozenStatsBatchNorm2d
from retina.model.fused import conv_norm_relu
from retina.model.retinanet import Outputs, RetinaNet
from retina.train.loop import train
from retina.train.schedule import build_optimizer
from retina.train.step import train_step
from retina.train.step_flags import StepFlags

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_focal_loss_equals_the_cpu_in_float64(dtype: torch.dtype) -> None:
    logits = (torch.randn(3000, 80) * 4).to(dtype)
    labels = torch.randint(-1, 81, (3000,))
    on_cuda = logits.to(CUDA).requires_grad_()
    exact = logits.double().requires_grad_()
    loss = sigmoid_focal_loss(on_cuda, labels.to(CUDA), reduction="sum")
    expected = sigmoid_focal_loss(exact, labels, reduction="sum", impl="reference")
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert on_cuda.grad is not None and exact.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(on_cuda.grad.cpu().double(), exact.grad, rtol=tolerance, atol=tolerance / 10)


def test_matching_and_detections_equal_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 4 + torch.rand(30, 2, generator=generator) * 150], dim=1)
    target = Target(boxes, torch.randint(0, 9, (30,), generator=generator), boxes[:3] + 50)
    results = []
    for device in (CPU, CUDA):
        anchors = make_anchors(Anchors(), 320, 384, device)
        moved = Target(*(part.to(device) for part in target))
        results.append(assign(anchors, [moved], [(300, 370)], 9, Assign()))
    assert torch.equal(results[0].labels_NR, results[1].labels_NR.cpu())
    assert torch.equal(results[0].boxes_NR4, results[1].boxes_NR4.cpu())

    torch.manual_seed(0)
    config = Config.model_validate(
        {"model": {"backbone": "resnet18", "weights": None, "norm": "group", "channels": 32}}
    )
    model = RetinaNet(config, 9).eval()
    torch.nn.init.normal_(model.cls_logits.weight, std=0.3)
    images = torch.randn(2, 3, 128, 160, generator=generator)
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        detections = []
        for device in (CPU, CUDA):
            anchors = make_anchors(config.anchors, 128, 160, device)
            detections.append(detect(model.to(device)(images.to(device)), anchors, [(128, 160)] * 2, Detect()))
    for a, b in zip(*detections, strict=True):
        assert abs(len(a.scores) - len(b.scores)) <= 1
        torch.testing.assert_close(a.scores[:20], b.scores[:20].cpu(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("box", get_args(Loss.model_fields["box"].annotation))
def test_loss_and_matching_never_synchronize(box: str) -> None:
    anchors = make_anchors(Anchors(), 320, 384, CUDA)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 30, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 4 + torch.rand(2, 30, 2, generator=generator) * 150], dim=2).to(CUDA)
    labels = torch.zeros(30, dtype=torch.int64, device=CUDA)
    targets = [Target(each, labels, each[:2]) for each in boxes]
    logits = [torch.randn(2, len(level), 9, device=CUDA, requires_grad=True) for level in anchors]
    deltas = [torch.randn(2, len(level), 4, device=CUDA, requires_grad=True) for level in anchors]

    def step() -> torch.Tensor:
        assignment = assign(anchors, targets, [(320, 384), (300, 300)], 9, Assign())
        divisor = count_positives(assignment, 9).sum().clamp(min=1).expand(2)
        losses = detection_loss(Outputs(logits, deltas), anchors, assignment, divisor, Loss(box=box), 62.5)
        losses["loss"].backward()
        return losses["loss"].detach()

    expected = step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)  # and the same bits


@pytest.mark.parametrize("kind", ["bias", "frozen", "statistics", "residual", "projection", "stem"])
def test_fused_layers_equal_the_layers_one_by_one(kind: str) -> None:
    torch.manual_seed(0)
    inputs, side, padding = (3, 7, 3) if kind == "stem" else (32, 3, 1)
    conv = nn.Conv2d(inputs, 48, side, stride=2, padding=padding, bias=kind == "bias").to(CUDA)
    norm, projection = None if kind == "bias" else _norm(kind), None
    leaves = [torch.randn(2, inputs, 13, 18, device=CUDA)]
    if kind == "residual":
        leaves.append(torch.randn(2, 48, 7, 9, device=CUDA))
    if kind == "projection":
        leaves.append(torch.randn(2, 16, 13, 18, device=CUDA))
        projection = nn.Sequential(nn.Conv2d(16, 48, 1, stride=2, bias=False).to(CUDA), _norm(kind))
    upstream = torch.randn(2, 48, 7, 9, device=CUDA)
    torch.backends.cudnn.allow_tf32 = False
    results: list[list[torch.Tensor]] = []
    for half in (False, True):  # float32 takes the layers one by one
        wanted = [leaf.clone().requires_grad_() for leaf in leaves]
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            y = conv_norm_relu(conv, norm, *wanted, *([projection] if projection else []))
        assert y.dtype == (torch.bfloat16 if half else torch.float32)
        wanted += [p for module in (conv, norm, projection) if module is not None for p in module.parameters()]
        # The loss leaves out what rounding may move across the edge of the ReLU.
        clear = upstream * ((results[0][0] if results else y).detach() > 0.05)
        results.append([y.detach(), *torch.autograd.grad((y.float() * clear).sum(), wanted)])
    for exact, fused in zip(*results, strict=True):
        assert (fused.float() - exact).norm() < 0.01 * exact.norm()  # bfloat16 has three digits


def _norm(kind: str) -> nn.Module:
    norm = FrozenStatsBatchNorm2d(48, 1e-5).train() if kind == "statistics" else FrozenBatchNorm2d(48)
    for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.3, 2)):
        nn.init.uniform_(getattr(norm, name), low, high)
    return norm.to(CUDA)


LOSSES = [
    *(("cls", cls) for cls in get_args(Loss.model_fields["cls"].annotation)),
    *(("box", box) for box in get_args(Loss.model_fields["box"].annotation)),
    *(("normalizer", normalizer) for normalizer in get_args(Loss.model_fields["normalizer"].annotation)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), LOSSES)
def test_a_training_step_never_waits(tiny_yaml: Path, name: str, value: str) -> None:
    config = load_config(tiny_yaml, [f"loss.{name}={value}", "loss.ohem_batch=8", "data.workers=1"])
    data = CocoDataset(config.data.train_annotations, config.data.train_images)
    model = RetinaNet(config, data.num_classes).to(CUDA, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, ema_positives = build_optimizer(model, config.train), torch.tensor(100.0, device=CUDA)
    flags = StepFlags(CUDA)
    batches = [batches for _, batches in zip(range(3), train_batches(data, config, 0), strict=False)]
    for step in range(6):  # the first three compile the kernels and make the anchors of their image sizes
        torch.cuda.set_sync_debug_mode("default" if step < 3 else "error")
        try:
            on_device = [batch.to(CUDA) for batch in batches[step % 3]]
            losses = train_step(
                model, optimizer, on_device, data.num_classes, ema_positives, config, step, log_loss_parts=True
            )
            assert not flags.read()
            flags.send(step + 1, losses, on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert losses["finite"].item() == 1


@pytest.mark.parametrize(
    "flags", [["train.precision=fp32"], ["train.precision=bf16"], ["train.compile=true", "data.pad_multiple=96"]]
)
def test_a_resumed_run_ends_with_the_same_bits(tiny_yaml: Path, tmp_path: Path, flags: list[str]) -> None:
    config = load_config(tiny_yaml, [f"output_dir={tmp_path}/run", *flags])
    train(config)
    expected = checkpoint.digest(checkpoint.load(config.run_dir / checkpoint.LAST)["model"])
    (config.run_dir / checkpoint.LAST).unlink()  # previous.pt is two steps behind last.pt: these are trained again
    assert train(config, resume=True)["AP"] is not None
    assert checkpoint.digest(checkpoint.load(config.run_dir / checkpoint.LAST)["model"]) == expected


def test_a_detector_finds_the_same_in_threads_and_on_the_cpu(tiny_yaml: Path, tmp_path: Path) -> None:
    config = load_config(tiny_yaml, ["train.precision=fp32"])
    file = save_random_detector(tmp_path / "best.pt", config)
    images = sorted(Path(config.data.val_images).iterdir())
    on_cuda, on_cpu = (retina.load(file, device=device) for device in ("cuda", "cpu"))
    serial = [on_cuda(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(on_cuda, images * 4))
    for one, other in zip(serial * 4, found, strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)
    for one, reference in zip(serial, map(on_cpu, images), strict=True):
        assert len(one) > 5 and not one.boxes.is_cuda
        torch.testing.assert_close(one.scores[:5], reference.scores[:5], rtol=1e-3, atol=1e-3)
