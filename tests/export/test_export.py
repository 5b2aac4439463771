"""tools/export.py and tools/eval.py on exported files, with a detector of random weights on a tiny data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_helpers import run_main
from export_helpers import CATEGORIES, random_config, random_image, random_model, write_checkpoint

from retina.config import Config
from retina.detect import Detections
from retina.evaluate import load
from retina.export import ExportedDetector, ExportError, job
from retina.export.int8 import quantize
from retina.export.network import inference_network
from retina.export.program import DetectionProgram
from retina.export.verify import Difference, compare_with_eager
from retina.model import WeightsError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config = random_config(tiny_yaml)
    return config, write_checkpoint(tmp_path_factory.mktemp("export") / "best.pt", config, random_model(config))


@pytest.fixture(scope="module")
def onnx_file(trained: tuple[Config, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For any batch and size."""
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    done = run_main("export.py", trained[1], "--format", "onnx", "--output", file)
    assert done.returncode == 0, done.stderr
    assert "boxes differ by at most 0.0" in done.stdout and str(file) in done.stdout
    return file


def assert_equal_to_pytorch(file: Path, trained: tuple[Config, Path], sizes: list[tuple[int, int]], batch: int) -> None:
    config, checkpoint = trained
    eager, exported = load(checkpoint, config), ExportedDetector(file)
    for size in sizes:
        images = np.stack([random_image(*size, seed) for seed in range(batch)])
        for image, found in zip(images, exported(images), strict=True):
            expected = eager(image)
            assert len(expected.scores) > 20
            torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-2)
            assert torch.equal(found.labels, expected.labels)


def test_onnx_takes_any_size_and_batch(onnx_file: Path, trained: tuple[Config, Path]) -> None:
    for batch in (1, 3):
        assert_equal_to_pytorch(onnx_file, trained, [(96, 128), (128, 97), (64, 64)], batch)


def test_onnx_file_says_what_it_is(onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    (images,) = model.graph.input
    sizes = [side.dim_param or side.dim_value for side in images.type.tensor_type.shape.dim]
    assert images.name == "images" and sizes == ["batch", "height", "width", 3]
    assert [output.name for output in model.graph.output] == ["boxes", "scores", "labels", "count"]
    assert [node.op_type for node in model.graph.node].count("NonMaxSuppression") == 1
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert [tuple(category) for category in json.loads(metadata["categories"])] == CATEGORIES
    assert metadata["source"].endswith("best.pt, step 5") and metadata["precision"] == "fp32"


def test_eval_of_the_file_equals_eval_of_the_checkpoint(
    onnx_file: Path, trained: tuple[Config, Path], tiny_yaml: Path, tmp_path: Path
) -> None:
    config, checkpoint = trained
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    metrics = []
    for file in (checkpoint, onnx_file):
        done = run_main("eval.py", tmp_path / "config.yaml", "--checkpoint", file, "--output", tmp_path)
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert metrics[0].pop("per_class").keys() == metrics[1].pop("per_class").keys()
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3) and metrics[0]["AR100"] > 0


def test_fixed_batch_without_resize(trained: tuple[Config, Path], tmp_path: Path) -> None:
    config, checkpoint = trained
    file = tmp_path / "model.onnx"
    fixed = ["--no-resize", "--size", "any", 64, "--batch", 2]
    done = run_main("export.py", checkpoint, "--format", "onnx", "--output", file, *fixed)
    assert done.returncode == 0, done.stderr
    assert_equal_to_pytorch(file, trained, [(64, 64)], 2)
    with pytest.raises(ExportError, match=r"takes 2 images of anyx64 px .* given 2 images of 64x70 px"):
        ExportedDetector(file)(np.zeros((2, 64, 70, 3), dtype=np.uint8))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    done = run_main("eval.py", tmp_path / "config.yaml", "--checkpoint", file, "--output", tmp_path)
    assert done.returncode == 1 and "export it with another --size or --batch" in done.stderr


def test_settings_that_the_file_cannot_follow_are_refused(
    onnx_file: Path, trained: tuple[Config, Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(trained[0].to_yaml())
    changes = ["detect.max_detections=1", "data.short_side=[96]", "train.eval_batch=2"]
    done = run_main("eval.py", config, "--checkpoint", onnx_file, "--output", tmp_path, *changes)
    assert done.returncode == 1, done.stdout
    assert "data.short_side is [64], given [96]; detect.max_detections is 100, given 1. Export it" in done.stderr


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 64, 64, 3), dtype=np.float32),
        np.zeros((64, 64, 3), dtype=np.uint8),
        np.zeros((1, 64, 64, 4), dtype=np.uint8),
        np.zeros((1, 0, 64, 3), dtype=np.uint8),
    ],
)
def test_other_arrays_are_refused(onnx_file: Path, images: np.ndarray) -> None:
    with pytest.raises(ExportError, match=r"given an array \w+ \(.*\), expected uint8 \(N, H, W, 3\) RGB"):
        ExportedDetector(onnx_file)(images)


@pytest.mark.parametrize("name", ["damaged.onnx", "damaged.pt2"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 no such file")
    done = run_main("eval.py", "--checkpoint", tmp_path / name)
    assert done.returncode == 1 and f"{name}: not readable as" in done.stderr, done.stderr
    with pytest.raises(WeightsError, match=r"is an exported file: retina\.export\.ExportedDetector runs it"):
        load(tmp_path / name)


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


def test_a_file_that_differs_is_not_written(
    trained: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_write", lambda *arguments: arguments[-1].write_text("new"))
    monkeypatch.setattr(job, "ExportedDetector", lambda path: None)
    file = tmp_path / "model.onnx"
    file.write_text("old")
    arguments = [trained[1], "--format", "onnx", "--output", file]
    monkeypatch.setattr(job, "compare_with_eager", lambda *arguments: Difference(8, 100, 0.2, 0.0, 0))
    done = run_main("export.py", *arguments)
    assert done.returncode == 1 and "boxes differ by at most 0.2000 px" in done.stderr
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(job, "compare_with_eager", lambda *arguments: Difference(8, 100, 0.05, 0.0, 0))
    assert run_main("export.py", *arguments).returncode == 0
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--format", "onnx", "--output", "model.pt2"], 2, "expected a name that ends in .onnx"),
        (["--format", "onnx", "--output", "m.onnx", "--precision", "bf16"], 2, "need --format torch"),
        (["--format", "torch", "--output", "m.pt2", "--calibrate", "."], 2, "give --size HEIGHT WIDTH"),
        (
            ["--format", "torch", "--output", "m.pt2", "--calibrate", ".", "--size", "9", "any"],
            2,
            "give --size HEIGHT W",
        ),
        (["--format", "torch", "--output", "m.pt2", "--calibrate", ".", "--precision", "bf16"], 2, "leave --precision"),
        (["--format", "torch", "--output", "m.pt2", "--batch", "0"], 2, "--batch: given 0, expected at least 1"),
        (["--format", "onnx", "--output", "m.onnx", "--size", "0", "5"], 2, "given 0, expected a number of pixels"),
        (["--format", "onnx", "--output", "m.onnx", "--images", "nowhere"], 2, "nowhere: no such folder of images"),
        (
            ["--format", "onnx", "--output", "m.onnx", "--size", "31", "41"],
            1,
            "no images to run, any number of images of 31x41",
        ),
    ],
)
def test_error_messages(trained: tuple[Config, Path], arguments: list[str], status: int, expected: str) -> None:
    done = run_main("export.py", trained[1], *arguments)
    assert done.returncode == status and expected in done.stderr, done.stderr


def test_missing_packages_are_named(
    trained: tuple[Config, Path], onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = run_main("export.py", trained[1], "--format", "onnx", "--output", "m.onnx")
    assert done.returncode == 1 and "needs onnxruntime" in done.stderr and "pip install onnxruntime" in done.stderr
    with pytest.raises(ExportError, match="needs onnxruntime"):
        ExportedDetector(onnx_file)
