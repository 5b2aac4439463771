"""The run folder: every file that a run writes, and its lines in the terminal. train/state.py has the checkpoints.

    config.yaml      the resolved configuration
    changes.json     what changed at a --resume: a list of step, key, from, to; only if there is something
    last.pt previous.pt best.pt     of a finished run with train.keep=weights only last.pt
    metrics.csv      a line for each logged step; without wall-clock time, so that equal runs write equal bytes
    eval.json        a list with the COCO numbers of each evaluation
    detections.json  the detections of the last evaluation, as COCO results
    events.out.*     TensorBoard (events.py): losses, learning rate, positives, images/s, AP, images, curves
    nonfinite_step_<step>.json   the image ids of a step whose loss was not finite
    .lock            held while the run writes; names its process

Only process 0 writes. In the other processes the methods that write do nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import msgspec
from torch import Tensor
from tqdm import tqdm

from retina.analysis.scoring import Evaluation
from retina.atomic_files import named_errors, write_text
from retina.command_line import FOLDER_IN_USE
from retina.config import Config
from retina.config_file import (
    KEYS_OF_PLACE,
    KEYS_TO_CHANGE,
    KEYS_WITHOUT_EFFECT,
    ConfigError,
    changed_keys,
    load_config,
)
from retina.data.batch import Batch
from retina.data.coco import CocoDataset
from retina.evaluate.coco import format_metrics
from retina.model import checkpoint
from retina.train.distributed import all_gather_list
from retina.train.errors import RunFolderError, RunFolderInUseError
from retina.train.events import EventFile

COLUMNS = ("step", "loss", "loss_cls", "loss_box", "loss_pos", "loss_neg", "lr", "positives", "grad_norm")
TERMINAL_COLUMNS = ("loss", "loss_cls", "loss_box", "lr", "positives", "grad_norm")
RUN_FILES = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST, "metrics.csv", "eval.json", "detections.json")
# What a run writes before its first step is logged or saved.
FIRST_FILES = (".lock", "config.yaml", "metrics.csv", "eval.json", "log.txt")
FIRST_PREFIXES = ("events.out.tfevents.", "nonfinite_step_")
SHARED_FOLDER_TRIES = 30  # in a minute


class Logbook:
    """Writes the files of a run and closes them as a context manager. It writes no file before `open`."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.active, self.folder = config, rank == 0, config.run_dir
        self.start_time, self.start_step = time.perf_counter(), 0
        self.unreadable: set[int] = set()  # ids of images
        self.events: EventFile | None = None
        self.lock: TextIO | None = None
        self.owner = f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})"
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext(), contextlib.ExitStack() as stack:
            for resource in (self.lock, self.events, self.bar):
                if resource is not None:
                    stack.callback(resource.close)

    def info(self, message: str) -> None:
        """Print `message` above the progress bar."""
        if self.active:
            with contextlib.suppress(OSError):  # a `tee` that has ended, or a closed terminal, must not end the run
                tqdm.write(message, file=sys.stdout)
                sys.stdout.flush()

    def open(self, step: int, evaluated_step: int, changes: list[dict[str, Any]]) -> None:
        """Lock the folder, remove entries of a killed run that come later, and open the files.

        `step` and `evaluated_step`: of the newest checkpoint. `changes`: the contents of changes.json.
        Raises RunFolderInUseError if another process trains in the folder, RunFolderError if one of this run does not
        see the folder of process 0.
        """
        self.start_step = step
        if self.active:
            self._open_files(step, evaluated_step, changes)
        self._check_shared()
        self.start_time = time.perf_counter()

    def _open_files(self, step: int, evaluated_step: int, changes: list[dict[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_folder()
        write_text(self.folder / "config.yaml", self.config.to_yaml())
        if changes:
            write_text(self.folder / "changes.json", json.dumps(changes, indent=1))
        rows = [",".join(COLUMNS), *(row for row in self._read_rows() if int(row.split(",", 1)[0]) <= step)]
        write_text(self.folder / "metrics.csv", "\n".join(rows) + "\n")
        self._write_evaluations([entry for entry in self.evaluations() if entry["step"] <= evaluated_step])
        self.events = EventFile(self.folder, step, self.config.to_yaml())
        if sys.stderr.isatty():  # where tqdm draws
            self.bar = tqdm(total=self.config.train.steps, initial=step, unit="step", dynamic_ncols=True)

    def log_step(self, step: int, losses: dict[str, Tensor], learning_rate: float, batches: list[Batch]) -> None:
        """Advance the progress bar; at every `log_every`-th step and the last one, write the numbers of the step."""
        for image_id, reason in (item for batch in batches for item in batch.unreadable.items()):
            if image_id not in self.unreadable:
                self.unreadable.add(image_id)
                self.info(f"skipped ({len(self.unreadable)} so far): {reason}")
        if self.bar is not None:
            self.bar.update()
        train = self.config.train
        if not self.active or self.events is None or (step % train.log_every and step < train.steps):
            return
        values = {"step": step, "lr": learning_rate} | {name: value.item() for name, value in losses.items()}
        metrics = self.folder / "metrics.csv"
        with named_errors(metrics), metrics.open("a", encoding="utf-8") as file:
            file.write(",".join(f"{values[name]:.9g}" for name in COLUMNS) + "\n")
        seconds_per_step = (time.perf_counter() - self.start_time) / (step - self.start_step)
        images_per_second = train.batch_size / seconds_per_step
        numbers = {name: values[name] for name in COLUMNS[1:]} | {"images_per_second": images_per_second}
        self.events.add_scalars("train", numbers, step)
        text = "  ".join(f"{name} {values[name]:.4g}" for name in TERMINAL_COLUMNS)
        remaining = timedelta(seconds=round(seconds_per_step * (train.steps - step)))
        self.info(f"step {step}/{train.steps}  {text}  {images_per_second:.1f} images/s  {remaining} left")

    def log_evaluation(
        self,
        step: int,
        evaluation: Evaluation,
        results: list[dict[str, Any]],
        dataset: CocoDataset,
        unreadable: dict[int, str],
    ) -> None:
        """Write an evaluation to eval.json, detections.json, the terminal and TensorBoard."""
        if not self.active or self.events is None:
            return
        metrics = evaluation.metrics
        self._write_evaluations([*self.evaluations(), {"step": step, **metrics}])
        write_text(self.folder / "detections.json", msgspec.json.encode(results).decode())  # six times as fast as json
        self.info(f"evaluation at step {step}\n{format_metrics(metrics)}")
        self.events.add_evaluation(step, evaluation, results, dataset, unreadable)

    def save_nonfinite_batch(self, step: int, image_ids: list[int]) -> Path:
        """Write the image ids of a step whose loss was not finite, and return the path of that file."""
        path = self.folder / f"nonfinite_step_{step}.json"
        if self.active:
            write_text(path, json.dumps({"step": step, "image_ids": image_ids}))
        return path

    def evaluations(self) -> list[dict[str, Any]]:
        """The entries of eval.json; empty before the first evaluation."""
        path = self.folder / "eval.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def last_evaluation(self) -> dict[str, Any]:
        """The last entry of eval.json; empty before the first evaluation."""
        return (self.evaluations() or [{}])[-1]

    def _lock_folder(self) -> None:
        """Lock the folder for the lifetime of this process."""
        self.lock = (self.folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit this lock
        except (BlockingIOError, PermissionError):
            self.lock.seek(0)
            raise RunFolderInUseError(
                f"{self.folder}: {FOLDER_IN_USE}; wait for it, or stop it: {self.lock.read() or 'unknown'}"
            ) from None
        except OSError as error:  # some network file systems have no locks
            self.info(f"{self.folder} cannot be locked ({error.strerror}): make sure that only one run writes here")
        with named_errors(self.folder / ".lock"):
            self.lock.truncate(0)
            self.lock.write(self.owner)
            self.lock.flush()

    def _check_shared(self) -> None:
        """Otherwise the run could not resume when process 0 is on another machine."""
        processes = all_gather_list([(self.owner, str(self.folder.absolute()))])
        for _ in range(SHARED_FOLDER_TRIES):  # a network file system may show a new file late
            seen = all_gather_list([self.active or self._read_owner() == processes[0][0]])
            if all(seen):
                return
            time.sleep(2)
        others = ", ".join(
            f"{path} of {owner}" for (owner, path), sees_it in zip(processes, seen, strict=True) if not sees_it
        )
        raise RunFolderError(
            f"{processes[0][1]} of {processes[0][0]} is not the same folder as {others}; all machines must share the "
            "run folder: use output_dir=FOLDER on a network disk"
        )

    def _read_owner(self) -> str | None:
        path = self.folder / ".lock"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _write_evaluations(self, entries: list[dict[str, Any]]) -> None:
        write_text(self.folder / "eval.json", json.dumps(entries, indent=1))

    def _read_rows(self) -> list[str]:
        """The complete lines of metrics.csv without the header. A kill may have truncated the last one."""
        path = self.folder / "metrics.csv"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [line for line in lines[1:] if line.count(",") == len(COLUMNS) - 1]


def check_run_folder(config: Config, resume: bool, keys_to_change: Collection[str] = ()) -> None:
    """Raise RunFolderError if the folder is not empty or, with `resume`, if its run has other settings.

    `keys_to_change`: of KEYS_TO_CHANGE, those that --change was given for. They may have other values.
    """
    folder = config.run_dir
    try:
        if not folder.exists() or not _has_run(folder):
            return
    except OSError as error:
        raise RunFolderError(f"run folder {folder}: {error.strerror}") from error
    if not resume:
        raise RunFolderError(
            f"{folder} is not empty; --resume continues its run, output_dir=FOLDER starts a run in another folder"
        )
    if not (folder / "config.yaml").exists():
        found = [name for name in RUN_FILES if (folder / name).exists()]
        if found and checkpoint.newest_state(folder) is None:
            raise RunFolderError(
                f"{folder} has {', '.join(found)}, but no config.yaml and no checkpoint of this program; there is no "
                "run to resume, and its files would be replaced; give another output_dir"
            )
        return
    try:
        old = load_config(folder / "config.yaml")
    except ConfigError as error:
        raise RunFolderError(f"{folder} was started by another version of this program: {error}") from None
    if changed := changed_keys(old, config, (*KEYS_WITHOUT_EFFECT, *KEYS_OF_PLACE, *keys_to_change)):
        values = config.flat()
        hint = "".join(
            f"; --change {key}={str(values[key]).replace(' ', '')} changes it from the next step on"
            for key in changed
            if key in KEYS_TO_CHANGE
        )
        raise RunFolderError(
            f"{folder} was started with other settings ({describe_changes(old, config, changed)}); use the same "
            f"settings, with each --change that was made, or another output_dir{hint}"
        )


def _has_run(folder: Path) -> bool:
    """Whether the folder has anything but what a run leaves that failed before its first step was logged or saved."""
    names = {path.name for path in folder.iterdir()}
    if ".lock" not in names:  # config.yaml is then the user's
        return bool(names)
    own = {name for name in names if name in FIRST_FILES or name.startswith(FIRST_PREFIXES)}
    if names - own:
        return True
    return "metrics.csv" in names and len((folder / "metrics.csv").read_text(encoding="utf-8").splitlines()) > 1


def describe_changes(old: Config, new: Config, keys: Collection[str]) -> str:
    """For a message: the old and the new value of each key."""
    before, after = old.flat(), new.flat()
    return ", ".join(f"{key} was {before[key]}, is {after[key]}" for key in keys)
