"""Shared by the tests: a tiny COCO-format data set made here, and a configuration that trains on it in seconds."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch is imported, and inherited by the processes that tests start: `make test` uses all cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from coco_files import write_coco

from retina.config import Config
from retina.config_file import load_config
from retina.cores import available_cores

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported: its kernels then run on the CPU, slowly


# The longest ones first, so that the processes of `make test` end at about the same time.
LONGEST_FILES = (
    "test_ablate_kill.py", "test_resume.py", "test_ablate.py", "test_train.py", "test_cli.py", "test_ddp.py",
)  # fmt: skip
# After torch.export, autograd works no more in a process that is forked, and tests of several processes fork.
# The one with more tests is first: a process takes its next file when two tests are left.
LAST_FILES = ("test_onnx.py", "test_package.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One process more than cores: some tests wait for a time limit, or for a process that they started."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else available_cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    places |= {name: len(LONGEST_FILES) + 1 + place for place, name in enumerate(LAST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST_FILES)))


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train", 22, seed=1)
    write_coco(root, "val", 10, seed=2)
    return root


@pytest.fixture(scope="session")
def tiny_yaml(coco_root: Path) -> Path:
    path = coco_root / "tiny.yaml"
    path.write_text(f"""
data:
  train_annotations: {coco_root}/train.json
  train_images: {coco_root}/train
  val_annotations: {coco_root}/val.json
  val_images: {coco_root}/val
  short_side: [48, 64]
  max_side: 96
  zoom: [0.8, 1.25]
  photometric: 0.5
  workers: 0
model: {{backbone: resnet10, base_channels: 32, weights: null, norm: group, frozen_stages: -1, channels: 32,
  head_convs: 1, head_norm: group}}
train: {{steps: 6, batch_size: 4, reference_batch: 4, lr: 0.01, warmup_steps: 2, precision: fp32, log_every: 1,
  eval_every: 3, checkpoint_every: 2, ema: 0.9, clip_norm: 10}}
""")
    return path


@pytest.fixture
def tiny(tiny_yaml: Path, tmp_path: Path) -> Config:
    return load_config(tiny_yaml, [f"output_dir={tmp_path}/run"])
