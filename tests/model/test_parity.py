"""Parity with the installed torchvision: equal weights give equal logits, anchors, detections and losses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection import retinanet_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina.assign import assign
from retina.config import Config
from retina.config_file import load_config
from retina.criterion import count_positives, detection_loss, normalizer
from retina.data.augment import eval_transform
from retina.data.batch import Target
from retina.detect import detect
from retina.model.anchors import make_anchors
from retina.model.key_tables import TORCHVISION_V1, rename_keys
from retina.model.pretrained import load_exactly
from retina.model.retinanet import RetinaNet
from retina.model.weights_file import WeightsError

PRESETS = Path(__file__).parents[2] / "configs/presets"
K = 6
SIZES = [(800, 224), (256, 352), (192, 608)]  # the first pads to P6 = 13 rows: torchvision's stride there is 61, not 64


def torchvision_model(version: str) -> TorchvisionRetinaNet:
    torch.manual_seed(1)
    if (
        version == "v1"
    ):  # as published: frozen BatchNorm with eps 0; torchvision's constructor builds it only with weights
        body = resnet50(weights=None, norm_layer=partial(FrozenBatchNorm2d, eps=0.0))
        extra = LastLevelP6P7(256, 256)
        backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
        model = TorchvisionRetinaNet(backbone, K)
    else:
        model = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=K)
        body = model.backbone.body
        for module in (body.conv1, body.bn1, body.layer1):
            module.requires_grad_(False)  # as its constructor does with pretrained weights
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    # Many different scores above the threshold, so that threshold, top-k, NMS and max_detections all have an effect.
    nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.05)
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -2.5)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.05)
    return model.eval()


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(request: pytest.FixtureRequest) -> tuple[TorchvisionRetinaNet, RetinaNet, Config]:
    theirs = torchvision_model(request.param)
    config = load_config(PRESETS / f"torchvision_{request.param}.yaml")
    ours = RetinaNet(config, K)
    load_exactly(ours, rename_keys(theirs.state_dict(), TORCHVISION_V1), "torchvision")
    return theirs, ours.eval(), config


def images(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(size[0]))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_logits_deltas_anchors_and_detections(
    pair: tuple[TorchvisionRetinaNet, RetinaNet, Config], size: tuple[int, int]
) -> None:
    theirs, ours, config = pair
    batch = images(size)
    sizes = [(size[0] - 7, size[1]), (size[0], size[1] - 13)]  # of the images, without the padding
    features = list(theirs.backbone(batch).values())
    their_outputs = theirs.head(features)
    outputs = ours(batch)
    torch.testing.assert_close(torch.cat(outputs.logits, dim=1), their_outputs["cls_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat(outputs.deltas, dim=1), their_outputs["bbox_regression"], rtol=0, atol=1e-4)

    anchors = make_anchors(config.anchors, *size, torch.device("cpu"))
    their_anchors = theirs.anchor_generator(ImageList(batch, sizes), features)
    assert torch.equal(torch.cat(anchors), their_anchors[0])

    levels = [len(level) for level in anchors]
    their_detections = theirs.postprocess_detections(
        {name: list(value.split(levels, dim=1)) for name, value in their_outputs.items()},
        [list(boxes.split(levels)) for boxes in their_anchors],
        sizes,
    )
    for detections, expected in zip(detect(outputs, anchors, sizes, config.detect), their_detections, strict=True):
        assert len(detections.scores) == len(expected["scores"]) > 50
        torch.testing.assert_close(detections.scores, expected["scores"], rtol=0, atol=1e-4)
        # Nearly equal scores may be in another order: each of theirs must be one of ours.
        same = (expected["scores"][:, None] - detections.scores).abs() < 1e-4
        same &= (expected["boxes"][:, None] - detections.boxes).abs().amax(dim=2) < 1e-2
        same &= expected["labels"][:, None] == detections.labels
        assert same.any(dim=0).all() and same.any(dim=1).all()


@pytest.mark.slow
def test_training_loss_and_gradients(pair: tuple[TorchvisionRetinaNet, RetinaNet, Config]) -> None:
    theirs, ours, config = pair
    batch = images((256, 352))
    boxes = torch.tensor([[10.0, 20.0, 90.0, 110.0], [100.0, 30.0, 160.0, 250.0], [5.0, 5.0, 30.0, 34.0]])
    gt = [
        {"boxes": boxes, "labels": torch.tensor([1, 5, 3])},
        {"boxes": boxes[:0], "labels": torch.tensor([]).long()},
    ]
    theirs.train()  # BatchNorm of V2 then uses, and both update, the statistics of the batch
    ours.train()
    features = list(theirs.backbone(batch).values())
    outputs = theirs.head(features)
    losses = theirs.compute_loss(gt, outputs, theirs.anchor_generator(ImageList(batch, [(256, 352)] * 2), features))
    sum(losses.values()).backward()

    anchors = make_anchors(config.anchors, 256, 352, torch.device("cpu"))
    targets = [Target(entry["boxes"], entry["labels"], torch.zeros(0, 4)) for entry in gt]
    assignment = assign(anchors, targets, [(256, 352)] * 2, K, config.assign)
    positives = count_positives(assignment, K)
    divisor = normalizer(positives, positives.sum(), 2, torch.tensor(100.0), config.loss.normalizer)
    our_losses = detection_loss(ours(batch), anchors, assignment, divisor, config.loss, config.detect.max_ratio)
    our_losses["loss"].backward()
    torch.testing.assert_close(our_losses["loss_cls"], losses["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(our_losses["loss_box"], losses["bbox_regression"], rtol=1e-5, atol=0)
    given = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    gradients = rename_keys(given, TORCHVISION_V1)
    trained = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert trained.keys() == gradients.keys()  # the same stages are frozen
    for name, gradient in trained.items():
        difference = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert difference < 1e-3, f"{name}: {difference}"  # float32 rounding: the orders of summation differ
    theirs.eval()
    ours.eval()


@pytest.mark.parametrize("shape", [(375, 500), (640, 427), (333, 1000), (900, 1200)], ids=str)
def test_config_resizes_as_torchvision(shape: tuple[int, int]) -> None:
    config = load_config(PRESETS / "torchvision_v1.yaml")
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    resized, _ = transform([image.permute(2, 0, 1).float() / 255])
    ours = eval_transform(image.numpy(), config.data)
    assert isinstance(ours, Tensor) and tuple(ours.shape[1:]) == resized.image_sizes[0]
    torch.testing.assert_close(ours, resized.tensors[0][:, : ours.shape[1], : ours.shape[2]], rtol=0, atol=1e-6)


def old_file_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the keys of the published V1 file, which is older than the installed class."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if "conv" in parts and parts[0] == "head":
            parts = [*parts[:3], str(2 * int(parts[3])), parts[5]]
        elif "inner_blocks" in parts or "layer_blocks" in parts:
            parts = [*parts[:4], parts[5]]
        renamed[".".join(parts)] = value
    return renamed


def test_published_keys_are_read_and_unknown_ones_refused() -> None:
    theirs = torchvision_model("v1")
    new = rename_keys(theirs.state_dict(), TORCHVISION_V1)
    old = rename_keys(old_file_state(theirs.state_dict()), TORCHVISION_V1)
    assert new.keys() == old.keys()
    theirs.load_state_dict(old_file_state(theirs.state_dict()))  # torchvision itself accepts these keys
    with pytest.raises(WeightsError, match=r"no rule for key 'head.mask"):
        rename_keys({"head.mask.weight": torch.zeros(1)}, TORCHVISION_V1)
    model = RetinaNet(load_config(PRESETS / "torchvision_v1.yaml"), K)
    with pytest.raises(WeightsError, match=r"missing: .*cls_logits.bias"):
        load_exactly(model, {key: value for key, value in new.items() if key != "cls_logits.bias"}, "file")
    with pytest.raises(WeightsError, match=r"not used: extra"):
        load_exactly(model, new | {"extra": torch.zeros(1)}, "file")
    with pytest.raises(WeightsError, match=r"of another shape: cls_logits.bias"):
        load_exactly(model, new | {"cls_logits.bias": torch.zeros(3)}, "file")
