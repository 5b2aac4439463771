"""Lets detectron2 and mmdetection compute what the parity tests compare with, and writes it to tests/fixtures/parity.

    python tests/model/make_parity_fixtures.py detectron2 --source CHECKOUT
    python tests/model/make_parity_fixtures.py mmdetection

detectron2: a checkout of its repository (the folder with detectron2/ and configs/), and fvcore, iopath, yacs,
termcolor, tabulate, portalocker, hydra-core, black. Its compiled operators are not needed for RetinaNet.
mmdetection: mmdet, mmengine, mmcv-lite. mmcv's compiled operators are replaced by placeholders, except `batched_nms`,
which calls torchvision's NMS on boxes shifted by class, as mmcv's does.

Nothing of these is needed to run the tests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from parity_inputs import (
    BOXES,
    CLASSES,
    LABELS,
    MAX_SIDE,
    RESIZE_FROM,
    SHORT_SIDE,
    SIZES,
    gradient_samples,
    image,
    weights,
)

FOLDER = Path(__file__).parents[1] / "fixtures/parity"
IMAGES = [image(f"image {i}", size) for i, size in enumerate(SIZES)]


def set_weights(model: torch.nn.Module, pixel_deviation: float) -> dict[str, list[int]]:
    """Give the model its weights; returns the shape of each key, without BatchNorm's counters."""
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if not key.endswith("tracked")}
    state = weights({key: tuple(shape) for key, shape in shapes.items()}, pixel_deviation)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)
    return shapes


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    trained = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {f"gradient {name}": gradient_samples(gradient) for name, gradient in trained.items()}


def write(
    name: str, arrays: dict[str, Any], shapes: dict[str, list[int]], sources: dict[str, str], **more: Any
) -> None:
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__, **sources}
    FOLDER.mkdir(parents=True, exist_ok=True)
    about = {"versions": versions, "shapes": shapes, **more}
    np.savez_compressed(FOLDER / f"{name}.npz", about=json.dumps(about), **arrays)
    print(f"{FOLDER / name}.npz", (FOLDER / f"{name}.npz").stat().st_size, "bytes", versions)


def msra_names() -> list[str]:
    """The names in R-50.pkl of detectron2's model zoo, from the logs in its issues 1688, 1698 and 4108."""
    norm = ("running_mean", "running_var", "beta", "gamma")
    names = ["conv1_w", "conv1_b", "fc1000_w", "fc1000_b", *(f"res_conv1_bn_{part}" for part in norm)]
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            for branch in ("1", "2a", "2b", "2c")[block > 0 :]:
                layer = f"res{stage}_{block}_branch{branch}"
                names += [f"{layer}_w", *(f"{layer}_bn_{part}" for part in norm)]
    return names


def detectron2(source: Path) -> None:
    sys.path.insert(0, str(source))
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
    from detectron2.config import get_cfg
    from detectron2.data.transforms import ResizeShortestEdge
    from detectron2.modeling import build_model
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    cfg = get_cfg()
    cfg.merge_from_file(str(source / "configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml"), allow_unsafe=True)
    cfg.MODEL.DEVICE, cfg.MODEL.RETINANET.NUM_CLASSES = "cpu", CLASSES
    model = build_model(cfg)
    shapes = set_weights(model, pixel_deviation=60)
    inputs = []
    for pixels, boxes, labels in zip(IMAGES, BOXES, LABELS, strict=True):
        truth = Instances(
            pixels.shape[:2], gt_boxes=Boxes(torch.from_numpy(boxes)), gt_classes=torch.from_numpy(labels)
        )
        bgr = torch.from_numpy(pixels[:, :, ::-1].transpose(2, 0, 1).copy())
        inputs.append({"image": bgr, "instances": truth})
    arrays: dict[str, Any] = {}
    model.train()
    images = model.preprocess_image(inputs).tensor
    features = [model.backbone(images)[name] for name in model.head_in_features]
    logits, deltas = model._transpose_dense_predictions(model.head(features), [CLASSES, 4])
    anchors = model.anchor_generator(features)
    labels = model.label_anchors(anchors, [each["instances"] for each in inputs])[0]
    arrays |= {
        "normalized": images[:, :, ::7, ::5],
        "logits": torch.cat(logits, dim=1).detach(),
        "deltas": torch.cat(deltas, dim=1).detach(),
        "anchors": Boxes.cat(anchors).tensor,
        "labels": torch.stack(labels).short(),
    }
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    arrays |= {"loss_cls": losses["loss_cls"].detach(), "loss_box": losses["loss_box_reg"].detach()} | gradients(model)
    with torch.no_grad():
        for i, found in enumerate(model.eval()(inputs)):
            instances = found["instances"]
            arrays[f"boxes {i}"], arrays[f"scores {i}"] = instances.pred_boxes.tensor, instances.scores
            arrays[f"classes {i}"] = instances.pred_classes.short()
    resize = ResizeShortestEdge(SHORT_SIDE, MAX_SIDE)
    for i, size in enumerate(RESIZE_FROM):
        pixels = image(f"resized {i}", size)
        arrays[f"resized {i}"] = resize.get_transform(pixels).apply_image(pixels)
    commit = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    import detectron2 as package

    sources = {"detectron2": package.__version__, "detectron2 commit": commit}
    msra = dict(zip(msra_names(), convert_basic_c2_names(msra_names()), strict=True))
    write("detectron2", arrays, shapes, sources, msra=msra)
    # A checkpoint as its training writes it, of a model with two weights.
    small = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    optimizer = build_optimizer(cfg, small)
    saver = DetectionCheckpointer(small, str(FOLDER), optimizer=optimizer, scheduler=build_lr_scheduler(cfg, optimizer))
    saver.save("detectron2_training", iteration=3)
    (FOLDER / "last_checkpoint").unlink()


def batched_nms(boxes: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, config: Any, *_: Any) -> Any:
    shifted = boxes + ids[:, None] * (boxes.max() + 1)
    keep = torchvision.ops.nms(shifted, scores, config["iou_threshold"])
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


class Placeholders(types.ModuleType):
    """In place of mmcv's compiled operators."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return batched_nms if name == "batched_nms" else type(name, (torch.nn.Module,), {})


def mmdetection() -> None:
    import mmcv

    modules = ("nms", "carafe", "modulated_deform_conv", "merge_cells", "roi_align", "multi_scale_deform_attn")
    for name in ("", *(f".{module}" for module in modules)):
        sys.modules[f"mmcv.ops{name}"] = Placeholders(f"mmcv.ops{name}")
    mmcv.ops = sys.modules["mmcv.ops"]
    import mmdet
    import mmengine
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.structures import InstanceData

    register_all_modules()
    file = Path(mmdet.__file__).parent / ".mim/configs/retinanet/retinanet_r50_fpn_1x_coco.py"
    cfg = mmengine.config.Config.fromfile(file)
    cfg.model.backbone.init_cfg, cfg.model.bbox_head.num_classes = None, CLASSES
    model = MODELS.build(cfg.model)
    shapes = set_weights(model, pixel_deviation=1)
    samples = []
    for pixels, boxes, labels in zip(IMAGES, BOXES, LABELS, strict=True):
        size = pixels.shape[:2]
        sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(labels))
        samples.append(sample)
    bgr = [torch.from_numpy(pixels[:, :, ::-1].transpose(2, 0, 1).copy()) for pixels in IMAGES]
    arrays: dict[str, Any] = {}
    model.train()
    data = model.data_preprocessor({"inputs": bgr, "data_samples": samples}, training=True)
    images, head = data["inputs"], model.bbox_head
    logits, deltas = head(model.extract_feat(images))
    flat_logits = [x.permute(0, 2, 3, 1).reshape(len(x), -1, CLASSES) for x in logits]
    flat_deltas = [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas]
    metas = [sample.metainfo for sample in data["data_samples"]]
    truth = [sample.gt_instances for sample in data["data_samples"]]
    anchors, valid = head.get_anchors([x.shape[2:] for x in logits], metas, device="cpu")
    all_labels, all_weights, *_ = head.get_targets(anchors, valid, truth, metas)
    labels, label_weights = torch.cat(all_labels, dim=1), torch.cat(all_weights, dim=1)
    arrays |= {
        "normalized": images[:, :, ::7, ::5],
        "logits": torch.cat(flat_logits, dim=1).detach(),
        "deltas": torch.cat(flat_deltas, dim=1).detach(),
        "anchors": torch.cat(head.prior_generator.grid_priors([x.shape[2:] for x in logits], device="cpu")),
        "labels": torch.where(label_weights > 0, labels, -1).short(),
    }
    losses = model.loss(images, data["data_samples"])
    sum(sum(level) for level in losses.values()).backward()
    arrays |= {"loss_cls": sum(losses["loss_cls"]).detach(), "loss_box": sum(losses["loss_bbox"]).detach()}
    arrays |= gradients(model)
    with torch.no_grad():
        for i, sample in enumerate(model.eval().predict(images, data["data_samples"])):
            found = sample.pred_instances
            arrays[f"boxes {i}"], arrays[f"scores {i}"] = found.bboxes, found.scores
            arrays[f"classes {i}"] = found.labels.short()
    for i, size in enumerate(RESIZE_FROM):
        arrays[f"resized {i}"] = mmcv.imrescale(image(f"resized {i}", size), (MAX_SIDE, SHORT_SIDE))
    versions = {"mmdet": mmdet.__version__, "mmengine": mmengine.__version__, "mmcv-lite": mmcv.__version__}
    write("mmdetection", arrays, shapes, versions)
    small_training_checkpoint()


def small_training_checkpoint() -> None:
    """What mmengine's runner writes into a checkpoint, with a few weights."""
    from mmengine.config import Config
    from mmengine.logging import MessageHub
    from mmengine.optim import OptimWrapper

    hub = MessageHub.get_instance("fixture")
    hub.update_scalar("train/loss", torch.tensor(1.5))
    hub.update_info("epoch", 1)
    small = torch.nn.Conv2d(1, 1, 1)
    optimizer = OptimWrapper(torch.optim.SGD(small.parameters(), lr=0.1))
    cfg = Config({"model": {"backbone": {"type": "ResNet", "depth": 50, "style": "caffe"}}})
    meta = {"epoch": 1, "iter": 10, "cfg": cfg.pretty_text, "dataset_meta": {"classes": ("cat", "dog")}}
    content = {"meta": meta, "state_dict": small.state_dict(), "message_hub": hub.state_dict()}
    torch.save(content | {"optimizer": optimizer.state_dict()}, FOLDER / "mmdetection_training.pth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=["detectron2", "mmdetection"])
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    mmdetection() if arguments.framework == "mmdetection" else detectron2(arguments.source)
