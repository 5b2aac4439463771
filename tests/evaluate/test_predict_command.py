"""The command that a report recommends detects with what was evaluated, or there is none."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from retina_tools.eval import predict_command

from retina.config_file import load_config, override_config
from retina.evaluate import find_weights, trained_config

PREDICT = ["python", "tools/predict.py"]


def command(run: Path, *overrides: str, file: Path | None = None, tta: bool = False) -> tuple[list[str], str]:
    weights = find_weights(run)
    config = load_config(file, list(overrides)) if file else override_config(trained_config(weights), list(overrides))
    return predict_command(argparse.Namespace(config=file and str(file), tta=tta), weights, config)


@pytest.mark.parametrize("override", ["train.eval_batch=2", "output_dir=elsewhere", "data.val_images=elsewhere"])
def test_a_checkpoint_alone(random_run: Path, override: str) -> None:
    assert command(random_run, override) == ([*PREDICT, str(random_run / "best.pt"), "IMAGE_OR_FOLDER"], "")


@pytest.mark.parametrize("override", ["detect.nms_iou=0.3", "data.max_side=999"])
def test_other_settings_of_the_detector(random_run: Path, tiny_yaml: Path, override: str) -> None:
    for file in (None, tiny_yaml):
        words, reason = command(random_run, override, file=file)
        assert words == [] and override in reason
    none, reason = command(random_run, tta=True)
    assert none == [] and "test-time augmentation" in reason


def test_a_config_with_other_settings(random_run: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    same, _ = command(random_run, file=tiny_yaml)
    assert same == [*PREDICT, str(random_run / "best.pt"), "IMAGE_OR_FOLDER"]
    other = tmp_path / "other.yaml"
    other.write_text(load_config(tiny_yaml, ["detect.nms_iou=0.3"]).to_yaml())
    words, reason = command(random_run, file=other)
    assert words == [*PREDICT, str(other), "IMAGE_OR_FOLDER", "--checkpoint", str(random_run / "best.pt")]
    assert reason == ""
    assert predict_command(argparse.Namespace(config=str(other), tta=False), None, load_config(other)) == ([], "")
