"""Compiled packages of tools/export.py, in fp32 and in int8, with a detector of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_helpers import run_main
from export_helpers import CATEGORIES, assert_equal_to_pytorch, random_image

from retina.config import Config
from retina.detect import Detections
from retina.evaluate import load
from retina.export import ExportedDetector
from retina.export.int8 import quantize
from retina.export.network import inference_network
from retina.export.program import DetectionProgram
from retina.export.verify import compare_with_eager

pytestmark = pytest.mark.slow


def test_package_for_any_batch(trained: tuple[Config, Path], tmp_path: Path) -> None:
    """Images of any size, too, would take minutes to compile."""
    file = tmp_path / "model.pt2"
    done = run_main("export.py", trained[1], "--format", "torch", "--size", 64, 96, "--output", file)
    assert done.returncode == 0, done.stderr
    for batch in (1, 3):
        assert_equal_to_pytorch(file, trained, [(64, 96)], batch)
    assert ExportedDetector(file).categories == CATEGORIES
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_int8_package(trained: tuple[Config, Path], tmp_path: Path) -> None:
    config, checkpoint = trained
    file = tmp_path / "model.pt2"
    arguments = ["--calibrate", config.data.val_images, "--size", 64, 96, "--batch", 2, "--output", file]
    done = run_main("export.py", checkpoint, "--format", "torch", *arguments)
    assert done.returncode == 0, done.stderr
    assert "best.pt, step 5: 3 classes; int8, 2 images of 64x96 px" in done.stdout
    data = json.loads(Path(config.data.val_annotations).read_text())
    data["images"] = [image for image in data["images"] if (image["width"], image["height"]) == (96, 64)]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [each for each in data["annotations"] if each["image_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(data))
    of_size = f"data.val_annotations={tmp_path / 'val.json'}"
    done = run_main("eval.py", "--checkpoint", file, of_size, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    found = {entry["image_id"] for entry in json.loads((tmp_path / "detections.json").read_text())}
    assert found == kept and len(kept) > 1


def test_int8_is_close(trained: tuple[Config, Path]) -> None:
    config, checkpoint = trained
    detector = load(checkpoint, config)
    network = inference_network(detector.model, torch.float32)
    images = [random_image(64, 96, seed) for seed in range(8)]
    with torch.inference_mode():
        batches = [DetectionProgram(network, config).prepare(torch.from_numpy(image)[None])[0] for image in images]
        quantized = quantize(network, batches)
        convolutions = [node for node in quantized.graph.nodes if "conv2d" in str(node.target)]
        assert len(convolutions) > 20
        for node in convolutions:
            assert all("dequantize" in str(source.target) for source in node.args[:2])
        program = DetectionProgram(quantized, config).eval()

        def run(images: np.ndarray) -> list[Detections]:
            boxes, scores, labels, count = program(torch.from_numpy(images))
            return [Detections(boxes[0, : count[0]], scores[0, : count[0]], labels[0, : count[0]])]

        found = compare_with_eager(run, detector, images[:3], resizes=True)
    assert found.scores < 0.05 and not found.is_rounding
