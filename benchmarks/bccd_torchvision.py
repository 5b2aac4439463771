"""torchvision's own RetinaNet trained on BCCD from scratch for a given time, to compare with configs/bccd.yaml.

    python benchmarks/bccd_torchvision.py --seconds 600

R18-FPN, the same images at 320 px with flips, torchvision's losses and defaults, SGD at 0.005 with momentum and a short
warm-up (AdamW with --adamw), float32: what a user gets by following its tutorial. The evaluation is that of retina.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import speed
import torch
from torch.nn import functional as F

from retina.config_file import load_config
from retina.data.coco import CocoDataset, read_image
from retina.detect import Detections
from retina.evaluate import evaluate_detections, format_metrics
from retina.evaluate.detections import on_image


def main() -> None:
    """Train, evaluate, and print the COCO table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--adamw", action="store_true")
    arguments = parser.parse_args()
    config = load_config("configs/bccd.yaml")
    train_set = CocoDataset(config.data.train_annotations, config.data.train_images)
    val_set = CocoDataset(config.data.val_annotations, config.data.val_images)
    torch.manual_seed(0)
    model = speed.torchvision_retinanet("resnet18", 240, 320, train_set.num_classes).train()
    if arguments.adamw:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    peak_lr = optimizer.param_groups[0]["lr"]
    rng = np.random.default_rng(0)
    start, step = time.perf_counter(), 0
    while time.perf_counter() - start < arguments.seconds:
        images, targets = [], []
        for index in rng.choice(len(train_set.records), 8, replace=False):
            record = train_set.records[index]
            image = torch.from_numpy(read_image(record.path)).permute(2, 0, 1).float()[None] / 255
            image = F.interpolate(image, scale_factor=0.5, mode="area")[0]
            boxes = torch.from_numpy(record.boxes) / 2
            if rng.random() < 0.5:
                image = image.flip(2)
                boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1])
                boxes = boxes + torch.tensor([image.shape[2], 0.0, image.shape[2], 0])
            images.append(image)
            targets.append({"boxes": boxes, "labels": torch.from_numpy(record.labels)})
        optimizer.param_groups[0]["lr"] = peak_lr * min(1.0, (step + 1) / 50)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    model.eval()
    results = []
    for record in val_set.records:
        image = torch.from_numpy(read_image(record.path)).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            (output,) = model([image])
        detections = Detections(output["boxes"], output["scores"], output["labels"])
        size = record.height, record.width
        results += on_image(detections, size, size, val_set.categories).coco_results(record.image_id)
    metrics = evaluate_detections(results, val_set).metrics
    print(f"torchvision {step} steps of 8 images in {seconds:.0f} s\n{format_metrics(metrics)}")


if __name__ == "__main__":
    main()
