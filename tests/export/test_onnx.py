"""ONNX files of tools/export.py, and tools/eval.py on them, with a detector of random weights on a tiny data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_helpers import run_main
from export_helpers import CATEGORIES, assert_equal_to_pytorch

from retina.config import Config
from retina.export import ExportedDetector, ExportError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def onnx_file(trained: tuple[Config, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For any batch and size."""
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    done = run_main("export.py", trained[1], "--format", "onnx", "--output", file)
    assert done.returncode == 0, done.stderr
    assert "boxes differ by at most 0.0" in done.stdout and str(file) in done.stdout
    return file


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
    thresholds = [each.pop("score_threshold") for each in metrics]
    assert thresholds[0]["per_class"].keys() == thresholds[1]["per_class"].keys()
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


def test_missing_packages_are_named(
    trained: tuple[Config, Path], onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = run_main("export.py", trained[1], "--format", "onnx", "--output", "m.onnx")
    assert done.returncode == 1 and "needs onnxruntime" in done.stderr and "pip install onnxruntime" in done.stderr
    with pytest.raises(ExportError, match="needs onnxruntime"):
        ExportedDetector(onnx_file)
