"""Runs of two processes: one that goes on with another number of processes, and what ends a run of several.

test_ddp.py compares single steps, test_two_machines.py starts torchrun.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import run_processes, run_two_processes, settings, stop_after, weights

from retina.config import Config
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches
from retina.train import distributed, logbook, loop
from retina.train.errors import RunError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory, on_cpu: None) -> Path:
    """The runs that the tests look at. The one in `changing` has 1, 2 and 1 processes, for two steps each."""
    folder = tmp_path_factory.mktemp("processes")
    changing = settings(tiny_yaml, folder / "changing")
    with stop_after(2):
        train_recorded(changing, folder)
    shutil.copytree(changing.run_dir, folder / "with_checkpoint")
    with stop_after(4):
        run_two_processes(run, tiny_yaml, folder, "changing", "changing")
    train_recorded(changing, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logbook, "SHARED_FOLDER_TRIES", 1)
        run_two_processes(run, tiny_yaml, folder, "with_checkpoint", "empty")
        run_two_processes(run, tiny_yaml, folder, "new", "with_checkpoint")
        patch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
        run_two_processes(run_silent, tiny_yaml, folder)
    return folder


def run(rank: int, yaml: Path, folder: Path, first: str, second: str) -> None:
    """Train in the folder `first`, or `second` for process 1. Write the message of an error to a file."""
    try:
        train_recorded(settings(yaml, folder / (first, second)[rank]), folder)
    except RunError as error:
        (folder / f"{first}_{second}_{rank}.txt").write_text(str(error))


def run_silent(rank: int, yaml: Path, folder: Path) -> None:
    """Process 1 takes longer for a step than process 0 waits."""
    step_function = loop.train_step

    def slow_step(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        time.sleep(3 * rank)
        return step_function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", slow_step)
        run(rank, yaml, folder, "silent", "silent")


def train_recorded(config: Config, folder: Path) -> None:
    """Resume the run. The image ids of each step are added to a file of this process."""
    step_function = loop.train_step

    def train_step(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        ids = [image_id for batch in args[2] for image_id in batch.image_ids]
        with (folder / f"images_{config.run_dir.name}_{os.environ.get('RANK', 0)}.txt").open("a") as file:
            file.write(json.dumps([args[6], ids]) + "\n")
        return step_function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        loop.train(config, resume=True)


def resume(rank: int, yaml: Path, run: Path) -> None:
    loop.train(settings(yaml, run, "train.batch_size=3", "train.eval_every=0"), resume=True)


def test_three_processes_resume_with_the_same_bits(tiny_yaml: Path, tmp_path: Path, on_cpu: None) -> None:
    """Two add a + b, in whichever order. The sum of three depends on the order of the gradients in the message."""
    run_processes(3, resume, tiny_yaml, tmp_path / "whole")
    with stop_after(2):
        run_processes(3, resume, tiny_yaml, tmp_path / "stopped")
    run_processes(3, resume, tiny_yaml, tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert (tmp_path / "stopped/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def train_with_other_settings(rank: int, yaml: Path, folder: Path) -> None:
    """Process 1 has another learning rate, and the validation images as training images."""
    config = settings(yaml, folder)
    data = config.data
    other = [f"data.train_annotations={data.val_annotations}", f"data.train_images={data.val_images}", "train.lr=0.2"]
    with pytest.raises(RunError, match=r"process 1 has another train\.lr, another training annotations than process 0"):
        loop.train(settings(yaml, folder, *other) if rank else config)


def test_processes_with_other_settings_or_data_are_refused(tiny_yaml: Path, tmp_path: Path, on_cpu: None) -> None:
    run_two_processes(train_with_other_settings, tiny_yaml, tmp_path / "run")


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_another_number_of_processes_changes_no_loss(folder: Path, finished_run: Path) -> None:
    one, changing = rows(finished_run), rows(folder / "changing")
    assert [row["step"] for row in changing] == [1, 2, 3, 4, 5, 6]
    for expected, row in zip(one, changing, strict=True):
        for name in ("loss", "loss_cls", "loss_box", "positives", "lr"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), (row["step"], name)
    assert changing[:2] == one[:2] and changing[2:] != one[2:]  # two processes add in another order


def test_another_number_of_processes_changes_no_sample(folder: Path, tiny_yaml: Path) -> None:
    config = settings(tiny_yaml, folder / "unused")
    data = CocoDataset(config.data.train_annotations, config.data.train_images)
    expected = [
        [image_id for batch in batches for image_id in batch.image_ids] for batches in train_batches(data, config, 0)
    ]
    seen: dict[int, list[int]] = {}
    for rank in range(2):
        for line in (folder / f"images_changing_{rank}.txt").read_text().splitlines():
            step, ids = json.loads(line)
            seen[step] = seen.get(step, []) + ids
    assert [seen[step] for step in range(6)] == expected
    assert len((folder / "images_changing_1.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("first, second", [("with_checkpoint", "empty"), ("new", "with_checkpoint")])
def test_every_process_must_see_the_folder_of_process_0(folder: Path, first: str, second: str) -> None:
    """Only one of the two folders has a checkpoint. Both processes end with the same message, before the first step."""
    messages = [(folder / f"{first}_{second}_{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{folder / first} of process ")
    assert f" on {socket.gethostname()}" in messages[0]
    assert f" is not the same folder as {folder / second} of process " in messages[0]
    assert messages[0].endswith("all machines must share the run folder: use output_dir=FOLDER on a network disk")
    assert not list(folder.glob(f"images_{first}_*")) and not (folder / "empty").exists()
    assert len(rows(folder / "with_checkpoint")) == 2


def test_a_process_without_an_answer_ends_the_run(folder: Path) -> None:
    """As if the other machine had lost power: it closes no connection."""
    message = (folder / "silent_silent_0.txt").read_text()
    assert message.startswith("process 0 of the run lost the connection to another one: Timed out waiting 1000ms")
    assert message.endswith("with --resume, the run starts at step 0.")
    assert "lost the connection" in (folder / "silent_silent_1.txt").read_text()
