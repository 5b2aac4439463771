"""The speed and the AP of exported files beside PyTorch and torchvision's RetinaNet with the same weights.

    python benchmarks/export.py runs/bccd/best.pt --calibrate data/bccd_train        (a folder of training images)

Every row is the whole detector: uint8 images of the data set's size in, detections in their pixels out, with the resize
and NMS. The validation images of the checkpoint's config must have one size. Rounds go through all rows in turn, and
the ratios are medians over rounds: a machine whose speed drifts favors none. Files are written to --output, and used
again where they are newer than the checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torchvision
from numpy.typing import NDArray
from speed import ratio_of_rounds
from torch import nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina.config import Config
from retina.data.coco import CocoDataset, read_image
from retina.detect import Detections
from retina.device import compile_network
from retina.evaluate import Detector, evaluate_detections, load
from retina.evaluate.detections import ImageDetections, on_image
from retina.export import ExportedDetector, InputShape, Job, export
from retina.model.anchors import make_anchors, num_anchors_per_cell
from retina.model.key_tables import TORCHVISION_V1, rename_keys
from retina.model.retinanet import RetinaNet

Found = Detections | ImageDetections
Run = Callable[[NDArray[np.uint8]], list[Found]]
CPU = torch.device("cpu")
TORCHVISION = "torchvision, fp32"


def main() -> None:
    """Print the machine and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True, help="folder of images for int8")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("runs/export"))
    arguments = parser.parse_args()
    eager = load(arguments.checkpoint, device="cpu")
    config = eager.config
    dataset = CocoDataset(config.data.val_annotations, config.data.val_images)
    images = np.stack([read_image(record.path) for record in dataset.records])
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}\n"
        f"{config.model.backbone}, {config.model.channels} channels, head norm {config.model.head_norm}, images "
        f"{images.shape[1]}x{images.shape[2]} resized to {short_side(config)} px, {arguments.rounds} rounds"
    )
    for batch in arguments.batch:
        rows = make_rows(arguments, eager, images.shape[1:3], batch)
        seconds = measure(rows, images[:batch], arguments.rounds)
        aps = {name: ap(run, images, dataset, batch) for name, run in rows.items()}
        print(f"\nbatch {batch}\n\n{table(batch, seconds, aps)}")


def make_rows(arguments: argparse.Namespace, eager: Detector, size: tuple[int, ...], batch: int) -> dict[str, Run]:
    compiled = copy.deepcopy(eager.model)
    compile_network(compiled, CPU)

    def pytorch(model: RetinaNet, precision: str) -> Run:
        train = eager.config.train.model_copy(update={"precision": precision})
        config = eager.config.model_copy(update={"train": train})
        return partial(run_pytorch, Detector(model, config, eager.categories, CPU, precision))

    rows: dict[str, Run] = {
        TORCHVISION: partial(run_torchvision, torchvision_with_weights(eager)),
        "PyTorch, fp32": pytorch(eager.model, "fp32"),
        "PyTorch, bf16": pytorch(eager.model, "bf16"),
        "torch.compile, bf16": pytorch(compiled, "bf16"),
    }
    digest = hashlib.sha256(arguments.checkpoint.read_bytes()).hexdigest()[:8]
    for suffix, precision in ((".onnx", "fp32"), (".pt2", "fp32"), (".pt2", "bf16"), (".pt2", "int8")):
        file = arguments.output / f"{arguments.checkpoint.parent.name}_{digest}_{precision}_{batch}{suffix}"
        if not file.exists():
            export(
                Job(
                    source=str(arguments.checkpoint),
                    format="onnx" if suffix == ".onnx" else "torch",
                    output=file,
                    shape=InputShape(batch, *size),
                    resize=True,
                    precision=precision,
                    calibrate=arguments.calibrate if precision == "int8" else None,
                    images=None,
                ),
                log=lambda line: None,
            )
        rows[f"{'ONNX Runtime' if suffix == '.onnx' else 'AOTInductor'}, {precision}"] = ExportedDetector(file)
    return rows


def short_side(config: Config) -> int:
    return config.data.eval_short_side or config.data.short_side[-1]


def torchvision_with_weights(eager: Detector) -> TorchvisionRetinaNet:
    """torchvision's RetinaNet with the weights and the anchors of `eager`, and its own resize."""
    config, classes = eager.config, len(eager.categories)
    body = torchvision.models.get_model(config.model.backbone, weights=None)
    width, channels = body.fc.in_features, config.model.channels
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(
        body, layers, [width // 4, width // 2, width], channels, extra_blocks=LastLevelP6P7(width, channels)
    )
    norm = partial(nn.GroupNorm, channels // 8) if config.model.head_norm == "group" else None
    head = RetinaNetHead(channels, num_anchors_per_cell(config.anchors), classes, norm_layer=norm)
    theirs = TorchvisionRetinaNet(
        backbone,
        classes,
        min_size=short_side(config),
        max_size=config.data.max_side,
        head=head,
        score_thresh=config.detect.score_threshold,
        nms_thresh=config.detect.nms_iou,
        detections_per_img=config.detect.max_detections,
        topk_candidates=config.detect.candidates,
    ).eval()
    ours = eager.model.state_dict()
    names = {key: next(iter(rename_keys({key: value}, TORCHVISION_V1))) for key, value in theirs.state_dict().items()}
    theirs.load_state_dict({key: ours[name] for key, name in names.items()})
    # The anchors of the first cell, whose center is the corner of the image.
    levels = make_anchors(config.anchors, 128, 128, CPU)
    theirs.anchor_generator.cell_anchors = [level[: num_anchors_per_cell(config.anchors)] for level in levels]
    return theirs


@torch.inference_mode()
def run_torchvision(model: TorchvisionRetinaNet, images: NDArray[np.uint8]) -> list[Found]:
    outputs = model([torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images])
    return [Detections(output["boxes"], output["scores"], output["labels"]) for output in outputs]


def run_pytorch(detector: Detector, images: NDArray[np.uint8]) -> list[Found]:
    return list(detector(list(images), batch_size=len(images)))


def measure(rows: dict[str, Run], images: NDArray[np.uint8], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call in each round. Before it, a call that is not counted: other rows have used the caches."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds + 1):
        for name, run in rows.items():
            run(images)
            start = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def ap(run: Run, images: NDArray[np.uint8], dataset: CocoDataset, batch: int) -> float:
    """COCO AP on the validation images, in percent."""
    results: list[dict[str, Any]] = []
    size, categories = images.shape[1:3], dataset.categories
    for start in range(0, len(images), batch):
        chosen = [min(start + i, len(images) - 1) for i in range(batch)]
        for i, detections in zip(dict.fromkeys(chosen), run(images[chosen]), strict=False):
            found = on_image(Detections(detections.boxes, detections.scores, detections.labels), size, size, categories)
            results += found.coco_results(dataset.records[i].image_id)
    return 100 * evaluate_detections(results, dataset).metrics["AP"]


def table(batch: int, seconds: dict[str, list[float]], aps: dict[str, float]) -> str:
    lines = ["| | ms per call | images/s | of torchvision's (range) | AP |", "|---|---|---|---|---|"]
    for name, times in seconds.items():
        ratio, low, high = ratio_of_rounds(seconds[TORCHVISION], times)
        median = statistics.median(times)
        lines.append(
            f"| {name} | {1000 * median:.1f} | {batch / median:.1f} | {ratio:.2f}x ({low:.2f} to {high:.2f}) | "
            f"{aps[name]:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
