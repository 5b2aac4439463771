from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from retina.config import Anchors, Config, Model
from retina.data.normalization import normalization_arguments
from retina.losses import prior_bias
from retina.model.anchors import make_anchors
from retina.model.backbone import FrozenStatsBatchNorm2d
from retina.model.retinanet import RetinaNet, per_anchor

CPU = torch.device("cpu")


def build(**model: object) -> RetinaNet:
    torch.manual_seed(0)
    settings = {"backbone": "resnet18", "weights": None, "channels": 16, "head_convs": 1} | model
    return RetinaNet(Config(model=Model(**settings)), 5)  # type: ignore[arg-type]


def test_every_anchor_starts_at_the_prior() -> None:
    model = build(norm="group", prior=0.02)
    assert 1 / (1 + math.exp(-prior_bias(0.02))) == pytest.approx(0.02)
    with torch.no_grad():
        scores = torch.cat(model(torch.randn(1, 3, 64, 64)).logits, dim=1).sigmoid()
    assert scores.mean().item() == pytest.approx(0.02, rel=0.1)


def test_outputs_have_the_order_of_the_anchors() -> None:
    """Channel 7 of the cell in row 1, column 2 is anchor 1 of that cell, class 2."""
    model = build(norm="batch").eval()
    x = torch.zeros(1, 16, 4, 4)
    nn.init.dirac_(model.cls_logits.weight.data.zero_()[:16])  # output channel c copies input channel c of its cell
    nn.init.zeros_(model.cls_logits.bias)  # type: ignore[arg-type]
    x[0, 7, 1, 2] = 1.0
    logits = per_anchor(model.cls_logits(x), 5)
    assert logits.nonzero().tolist() == [[0, (1 * 4 + 2) * 9 + 7 // 5, 7 % 5]]


@pytest.mark.parametrize("width", [64, 16])
def test_resnet10_is_half_of_resnet18(width: int) -> None:
    model = build(backbone="resnet10", norm="batch", base_channels=width)
    body = model.backbone.body
    assert [layer[0].conv1.out_channels for layer in (body.layer1, body.layer2, body.layer3, body.layer4)] == [
        width, 2 * width, 4 * width, 8 * width,
    ]  # fmt: skip
    convs = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 1 + 4 * 2 + 3 and all(  # the stem, two a stage, and the shortcuts of three of them
        conv.weight.std().item() == pytest.approx((2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5, rel=0.2)
        for conv in convs
    )
    outputs = model(torch.randn(1, 3, 64, 96))
    assert [logits.shape[1] for logits in outputs.logits] == [9 * n for n in (8 * 12, 4 * 6, 2 * 3, 1 * 2, 1 * 1)]


def test_forward_is_the_same_in_training_and_evaluation() -> None:
    model = build(norm="group", head_norm="group")
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        trained, evaluated = model.train()(images), model.eval()(images)
    for a, b in zip([*trained.logits, *trained.deltas], [*evaluated.logits, *evaluated.deltas], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(64, 96), (100, 130), (33, 257)])
def test_one_anchor_for_each_output(size: tuple[int, int]) -> None:
    model = build(norm="group")
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, *size))
    anchors = make_anchors(Anchors(), *size, CPU)
    assert [len(level) for level in anchors] == [level.shape[1] for level in outputs.logits]
    assert [level.shape[2] for level in outputs.deltas] == [4] * 5


def test_no_images_have_outputs_of_none() -> None:
    model = build(norm="batch").eval()
    one, none = model(torch.zeros(1, 3, 64, 96)), model(torch.zeros(0, 3, 64, 96))
    for a, b in zip([*one.logits, *one.deltas], [*none.logits, *none.deltas], strict=True):
        assert b.shape == (0, *a.shape[1:])


def test_cached_tensors_do_not_keep_the_state_of_their_first_caller() -> None:
    """A training takes those that a detection made."""
    make_anchors.cache_clear()
    normalization_arguments.cache_clear()
    cpu, default = torch.device("cpu"), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode():
            made = [*make_anchors(Anchors(), 64, 96, cpu), *normalization_arguments("imagenet", cpu)[:2]]
    finally:
        torch.set_default_dtype(default)
    again = [*make_anchors(Anchors(), 64, 96, cpu), *normalization_arguments("imagenet", cpu)[:2]]
    for one, two in zip(made, again, strict=True):
        assert one is two and one.dtype == torch.float32 and not one.is_inference()


def test_anchor_sizes_of_the_paper() -> None:
    p3 = make_anchors(Anchors(), 800, 1344, CPU)[0]
    sides = (p3[:9, 2:] - p3[:9, :2]).prod(dim=1).sqrt()
    torch.testing.assert_close(sides, torch.tensor([32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)] * 3))
    ratios = (p3[:9, 3] - p3[:9, 1]) / (p3[:9, 2] - p3[:9, 0])
    torch.testing.assert_close(ratios, torch.tensor([0.5] * 3 + [1.0] * 3 + [2.0] * 3))
    assert sum(len(level) for level in make_anchors(Anchors(), 800, 1344, CPU)) == 201_600
    shifted = make_anchors(Anchors(offset=0.5), 800, 1344, CPU)[0]
    torch.testing.assert_close(shifted - p3, torch.full_like(p3, 4.0), rtol=0, atol=1e-4)


def test_settings_change_the_network() -> None:
    images = torch.randn(1, 3, 64, 64)

    def p7(**model: object) -> torch.Tensor:
        network = build(norm="batch", **model).eval()
        with torch.no_grad():
            return network(images).logits[-1]

    assert not torch.equal(p7(relu_before_p7=True), p7(relu_before_p7=False))
    assert build(norm="batch", p6_from="c5").backbone.fpn.extra_blocks.p6.in_channels == 512
    assert build(norm="batch", p6_from="p5").backbone.fpn.extra_blocks.p6.in_channels == 16


def test_frozen_stages_and_norms() -> None:
    model = build(norm="frozen_stats", frozen_stages=2)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not any("body.conv1" in n or "body.layer1" in n or "body.layer2" in n for n in names)
    assert any("body.layer3.0.bn1.weight" in n for n in names)  # the affine part trains, as in mmdetection
    norms = [m for m in model.modules() if isinstance(m, FrozenStatsBatchNorm2d)]
    before = norms[-1].running_mean.clone()  # type: ignore[union-attr]
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(norms[-1].running_mean, before)  # type: ignore[arg-type]
    assert all(p.requires_grad for p in build(norm="batch", frozen_stages=-1).parameters())


def test_the_stride_of_a_bottleneck_moves() -> None:
    x, outputs = torch.randn(1, 3, 64, 64), {}
    for first in (False, True):
        model = build(backbone="resnet50", norm="batch", stride_in_1x1=first).eval()
        strides = [stage[0].conv1.stride + stage[0].conv2.stride for stage in stages_2_to_4(model)]
        assert strides == [(2, 2, 1, 1) if first else (1, 1, 2, 2)] * 3
        assert all(conv.stride == (1, 1) for stage in stages_2_to_4(model) for conv in convolutions(stage[1:]))
        with torch.no_grad():
            outputs[first] = model(x)
    assert [level.shape for level in outputs[True].logits] == [level.shape for level in outputs[False].logits]
    assert not torch.equal(outputs[True].logits[0], outputs[False].logits[0])
    with pytest.raises(ValueError, match=r"stride_in_1x1: resnet18 has no bottlenecks"):
        Model(backbone="resnet18", stride_in_1x1=True)


def stages_2_to_4(model: RetinaNet) -> list[nn.Sequential]:
    return [model.backbone.body.layer2, model.backbone.body.layer3, model.backbone.body.layer4]


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [each for each in module.modules() if isinstance(each, nn.Conv2d)]


@pytest.mark.parametrize("backbone", ["resnet34", "resnext50_32x4d"])
def test_other_backbones(backbone: str) -> None:
    with torch.no_grad():
        outputs = build(norm="batch", backbone=backbone).eval()(torch.randn(1, 3, 64, 64))
    assert outputs.logits[0].shape == (1, 8 * 8 * 9, 5)
