"""A disk that becomes full or read-only, or whose folder is removed, at each call with which a run writes.

The run ends with a message that names the folder and the reason, its newest checkpoint loads, and after the repair
`--resume` ends with the bits of a run without a fault. All that writes is real. What computes is replaced by stand-ins,
so that hundreds of runs take seconds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import run_main
from disk_faults import NUMBERS, Disk
from torch import nn
from train_helpers import settings, stop_after

from retina.config import Config
from retina.evaluate.coco import evaluate_detections
from retina.model import checkpoint
from retina.train import events, loop

pytestmark = pytest.mark.slow
REASONS = {fault: os.strerror(number) for fault, number in NUMBERS.items()}
REASONS["removed"] = "it was removed, or its disk is gone"


class SmallModel(nn.Module):
    def __init__(self, *_: object) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(200, 200), nn.Linear(3, 3)  # larger and smaller than the buffer of a file


def small_step(model: nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **_: object) -> dict[str, torch.Tensor]:
    """Like `train_step`: a function of the step and of the state."""
    step = args[4]
    loss = torch.stack([(parameter - step).square().mean() for parameter in model.parameters()]).sum()
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    names = ("loss", "loss_cls", "loss_box", "loss_pos", "loss_neg", "positives", "grad_norm")
    return dict.fromkeys(names, loss.detach()) | {"finite": torch.tensor(1.0), "stop": torch.tensor(0.0)}


@pytest.fixture(scope="module")
def config(tiny_yaml: Path) -> Iterator[Config]:
    """Four steps: checkpoints after 3 and at the end, numbers after 2 and at the end, where the evaluation is too."""
    flags = ["train.steps=4", "train.checkpoint_every=3", "train.log_every=2", "train.eval_every=0"]
    memory = "/dev/shm" if Path("/dev/shm").exists() else None  # thousands of files are made and deleted
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield settings(tiny_yaml, Path(folder) / "run", *flags, "train.keep=weights")


@pytest.fixture(scope="module", autouse=True)
def stand_ins(config: Config) -> Iterator[None]:
    train_set, val_set = loop.load_datasets(config, loop.Logbook(config, 1))
    batches = list(loop.train_batches(train_set, config, 0))
    box = [10.0, 10.0, 20.0, 20.0]
    results = [{"image_id": r.image_id, "category_id": 3, "bbox": box, "score": 0.9} for r in val_set.records]
    evaluation, text = evaluate_detections(results, val_set), config.to_yaml()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retina_tools.train.load_config_or_exit", lambda *_: config)
        patch.setattr(Config, "to_yaml", lambda _: text)
        patch.setattr("retina.train.start.RetinaNet", SmallModel)
        patch.setattr(loop, "check_run_folder", lambda *_: None)
        patch.setattr(loop, "load_datasets", lambda *_: (train_set, val_set))
        patch.setattr(loop, "train_batches", lambda data, config, step, *_: batches[step:])
        patch.setattr(loop, "train_step", small_step)
        patch.setattr(loop, "inference_on_dataset", lambda *_: (results, {}))
        patch.setattr(loop, "score", lambda *_: evaluation)
        patch.setattr(events, "plot_precision_recall", lambda _: None)
        patch.setattr(events.SummaryWriter, "add_figure", lambda self, name, figure, step: None)
        patch.setattr(events, "NUM_IMAGES", 1)
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def start(config: Config, stand_ins: None) -> Path:
    """The folder of a run that was stopped after step 2."""
    with stop_after(2):
        loop.train(config)
    return config.run_dir.rename(config.run_dir.with_name("start"))


@pytest.fixture(scope="module")
def clean(config: Config, start: Path) -> tuple[Disk, dict[str, str]]:
    """A disk that did not fail, and the results of its run."""
    disk = Disk(config.run_dir)
    assert run_on(disk, start)[0].returncode == 0
    return disk, results_of(config.run_dir)


def run_on(disk: Disk, start: Path | None) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Resume the run of `start`, or start a new one, on the disk, up to its end or its fault, and repair the disk."""
    shutil.rmtree(disk.folder, ignore_errors=True)
    if start is not None:
        shutil.copytree(start, disk.folder)
    printed: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", printed.append)  # prints the traceback of a thread
        disk.insert(patch)
        ended = run_main("train", "tiny.yaml", "--resume")
    assert not printed
    return ended, disk.repair()


def results_of(run: Path) -> dict[str, str]:
    """What must be equal in every bit."""
    files = {name: (run / name).read_text() for name in ("metrics.csv", "eval.json", "detections.json", "config.yaml")}
    return files | {path.name: checkpoint.digest(checkpoint.load(path)) for path in run.glob("*.pt")}


def content_of(run: Path) -> str:
    """A digest of all that a resumed run reads."""
    digest = hashlib.sha256()
    for path in sorted(run.iterdir()):
        if "tfevents" not in path.name and path.name != ".lock":
            digest.update(f"{path.name} {path.stat().st_size};".encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_at_every_call_that_writes(
    fault: str, config: Config, start: Path, clean: tuple[Disk, dict[str, str]]
) -> None:
    disk, expected = clean
    assert len(disk.calls) > 100
    resumed: set[str] = set()
    for call in disk.calls:
        ended, made_anew = run_on(Disk(config.run_dir, fault, call), start)
        if fault == "removed" and ended.returncode == 0:
            assert made_anew or results_of(config.run_dir) == expected, call  # or nothing was left to write
        elif not made_anew:
            assert_explained(ended, config.run_dir, REASONS[fault], str(call))
        newest, refused = checkpoint.load_newest(config.run_dir)
        assert newest is not None and newest["step"] >= 2 and not refused, call
        if (content := content_of(config.run_dir)) not in resumed:
            loop.train(config, resume=True)
            assert results_of(config.run_dir) == expected, call
            resumed.add(content)


@pytest.mark.parametrize("fault", NUMBERS)
def test_a_fault_before_the_first_step(fault: str, config: Config, clean: tuple[Disk, dict[str, str]]) -> None:
    """The files at the start are the same as in the test above, but the folder is new and there is no checkpoint."""
    for call in [call for call in clean[0].calls if call.main_thread][:4]:
        ended, _ = run_on(Disk(config.run_dir, fault, call), None)
        assert_explained(ended, config.run_dir, REASONS[fault], str(call), "starts at step 0")
    loop.train(config, resume=True)
    assert results_of(config.run_dir).keys() == clean[1].keys()


@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_while_a_diverged_batch_is_saved(
    fault: str, config: Config, start: Path, clean: tuple[Disk, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *args, **_: small_step(*args) | {"finite": torch.tensor(0.0)})
    diverged = Disk(config.run_dir)
    assert "nonfinite_step_3.json" in run_on(diverged, start)[0].stderr
    opened = next(i for i, call in enumerate(diverged.calls) if "nonfinite" in call.what)
    for call in [call for call in diverged.calls[opened:] if call.main_thread]:
        ended, _ = run_on(Disk(config.run_dir, fault, call), start)
        if fault != "removed" or call.what != "fsync":
            assert_explained(ended, config.run_dir, REASONS[fault], str(call))
    monkeypatch.setattr(loop, "train_step", small_step)
    loop.train(config, resume=True)
    assert results_of(config.run_dir) == clean[1]


def assert_explained(
    ended: subprocess.CompletedProcess[str], run: Path, reason: str, call: str, continues: str = "continues after "
) -> None:
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1 and len(lines) == 2, f"{call}: {ended.returncode} {ended.stderr}"
    assert lines[0].startswith(f"error: run folder {run}: {reason} ("), f"{call}: {lines[0]}"
    assert f"--resume {continues}" in lines[1], f"{call}: {lines[1]}"
