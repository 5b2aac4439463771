"""Test-time augmentation, and what an image costs."""

from __future__ import annotations

import mmap
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.ops import batched_nms

import retina
from retina.config_file import load_config, override_config
from retina.data.coco import CocoDataset, read_image
from retina.evaluate import inference_on_dataset, inference_with_tta
from retina.evaluate.cost import count_flops, measure_cost

CPU = torch.device("cpu")


def test_versions_of_an_image_are_merged_by_torchvisions_nms(random_run: Path, tiny_yaml: Path) -> None:
    """Each version is made by OpenCV and PIL, and detected on alone at its own size."""
    config = load_config(tiny_yaml, ["detect.tta_scales=[0.5, 1.0]", "detect.max_detections=60"])
    model = retina.load(random_run, config, device="cpu").model
    data = CocoDataset(config.data.val_annotations, config.data.val_images).evenly_spaced(3)
    results, unreadable = inference_with_tta(model, data, config, CPU)
    assert not unreadable
    for record in data.records:
        image = Image.fromarray(read_image(record.path))
        boxes, scores, labels = [], [], []
        for scale in (0.5, 1.0):
            factor = min(64 * scale / min(image.size), 96 * scale / max(image.size))
            size = round(image.width * factor), round(image.height * factor)
            method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
            resized = Image.fromarray(cv2.resize(np.asarray(image), size, interpolation=method))
            own_size = [f"data.eval_short_side={min(size)}", f"data.max_side={max(size)}"]
            detector = retina.load(random_run, override_config(config, own_size), device="cpu")
            for mirrored in (False, True):
                found = detector(ImageOps.mirror(resized) if mirrored else resized, batch_size=1)
                x1, y1, x2, y2 = found.boxes.T
                if mirrored:
                    x1, x2 = size[0] - x2, size[0] - x1
                to_image = torch.tensor([image.width / size[0], image.height / size[1]] * 2)
                boxes.append(torch.stack([x1, y1, x2, y2], 1) * to_image)
                scores.append(found.scores)
                labels.append(found.labels)
        all_boxes, all_scores, all_labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        keep = batched_nms(all_boxes, all_scores, all_labels, config.detect.nms_iou)[:60]
        ours = [entry for entry in results if entry["image_id"] == record.image_id]
        assert len(ours) == 60 == len(keep)
        assert [entry["score"] for entry in ours] == pytest.approx(all_scores[keep].tolist(), abs=1e-5)
        xywh = np.array([entry["bbox"] for entry in ours])
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        assert np.abs(xyxy - all_boxes[keep].numpy()).max() < 0.02


def test_a_file_that_cannot_be_read_is_left_out(random_run: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    config = load_config(tiny_yaml, ["detect.tta_scales=[1.0]", "data.unreadable=skip"])
    for file in Path(config.data.val_images).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.name != "0002.png" else b"damaged")
    data = CocoDataset(config.data.val_annotations, tmp_path)
    model = retina.load(random_run, config, device="cpu").model
    results, unreadable = inference_with_tta(model, data, config, CPU)
    plain, also_unreadable = inference_on_dataset(model, data, config, CPU)
    assert unreadable == also_unreadable and list(unreadable) == [1014]
    assert {entry["image_id"] for entry in results} == {entry["image_id"] for entry in plain}


def test_operations_are_two_for_each_multiplication_of_a_convolution(random_run: Path) -> None:
    model = retina.load(random_run, device="cpu").model
    expected = 0

    def count(conv: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal expected
        expected += 2 * output.numel() * conv.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[arg-type]
    model(torch.zeros(1, 3, 64, 96))
    for hook in hooks:
        hook.remove()
    assert count_flops(model, 64, 96) == expected > 1e7
    assert next(model.parameters()).device == CPU  # the count was made on a copy


def test_cost_of_the_images(random_run: Path, tiny_yaml: Path) -> None:
    config = load_config(tiny_yaml, ["data.short_side=[64]", "data.max_side=64", "data.pad_multiple=64"])
    model = retina.load(random_run, config, device="cpu").model
    data = CocoDataset(config.data.val_annotations, config.data.val_images)
    cost = measure_cost(model, data, config, CPU, images=2)
    assert cost.gflops == count_flops(model, 64, 64) / 1e9
    assert cost.parameters == sum(value.numel() for value in model.state_dict().values())  # GroupNorm: no buffers
    assert cost.milliseconds > 0 and cost.peak_memory_mb is not None
    weights = 4 * cost.parameters / 1e6
    assert weights < cost.peak_memory_mb < 1e5  # resident: more than the weights alone
    with mmap.mmap(-1, 200_000_000) as used:  # not a tensor, whose memory the allocator may keep
        for page in range(0, len(used), mmap.PAGESIZE):
            used[page] = 1  # makes it resident
        more = measure_cost(model, data, config, CPU, images=1).peak_memory_mb
    assert more is not None
    less = measure_cost(model, data, config, CPU, images=1).peak_memory_mb
    assert less is not None and less < more - 150  # each call has its own peak
