"""The run folder: every file that a run writes, and its lines in the terminal. train/state.py has the checkpoints.

    config.yaml      the resolved configuration
    last.pt previous.pt best.pt     of a finished run with train.keep=weights only last.pt
    metrics.csv      a line for each logged step; without wall-clock time, so that equal runs write equal bytes
    eval.json        a list with the COCO numbers of each evaluation
    detections.json  the detections of the last evaluation, as COCO results
    events.out.*     TensorBoard: losses, learning rate, positives, images/s, AP, images, precision-recall curves
    nonfinite_step_<step>.json   the image ids of a step whose loss was not finite
    .lock            held while the run writes

Only process 0 writes. In the other processes the methods that write do nothing.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import msgspec
import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from retina.analysis.scoring import Evaluation
from retina.atomic_files import write_text
from retina.config import KEYS_WITHOUT_EFFECT, Config
from retina.config_file import ConfigError, load_config
from retina.data.coco import CocoDataset, read_image
from retina.data.loader import Batch
from retina.evaluate.coco import format_metrics
from retina.plots.boxes import draw_boxes
from retina.plots.run import plot_precision_recall
from retina.train.errors import RunFolderError, RunFolderInUseError

COLUMNS = ("step", "loss", "loss_cls", "loss_box", "loss_pos", "loss_neg", "lr", "positives", "grad_norm")
TERMINAL_COLUMNS = ("loss", "loss_cls", "loss_box", "lr", "positives", "grad_norm")
NUM_IMAGES, IMAGE_SCORE_THRESHOLD = 6, 0.3  # detections drawn for TensorBoard


class Logbook:
    """Writes the files of a run and closes them as a context manager. It writes no file before `open`."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.active, self.folder = config, rank == 0, config.run_dir
        self.start_time, self.start_step = time.perf_counter(), 0
        self.unreadable: set[int] = set()  # ids of images
        self.writer: SummaryWriter | None = None
        self.lock: TextIO | None = None
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for resource in (self.bar, self.writer, self.lock):
            if resource is not None:
                resource.close()

    def info(self, message: str) -> None:
        """Print `message` above the progress bar."""
        if self.active:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def open(self, step: int) -> None:
        """Lock the folder, remove entries of a killed run that are later than `step`, and open the files.

        Raises RunFolderInUseError if another process trains in the folder.
        """
        self.start_step = step
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_folder()
        write_text(self.folder / "config.yaml", self.config.to_yaml())
        rows = [",".join(COLUMNS), *(row for row in self._read_rows() if int(row.split(",", 1)[0]) <= step)]
        write_text(self.folder / "metrics.csv", "\n".join(rows) + "\n")
        self._write_evaluations([entry for entry in self.evaluations() if entry["step"] <= step])
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        self.writer.add_text("config", f"```yaml\n{self.config.to_yaml()}\n```", step)
        if sys.stderr.isatty():  # where tqdm draws
            self.bar = tqdm(total=self.config.train.steps, initial=step, unit="step", dynamic_ncols=True)
        self.start_time = time.perf_counter()

    def log_step(self, step: int, losses: dict[str, Tensor], learning_rate: float, batches: list[Batch]) -> None:
        """Advance the progress bar; at every `log_every`-th step and the last one, write the numbers of the step."""
        for image_id, reason in (item for batch in batches for item in batch.unreadable.items()):
            if image_id not in self.unreadable:
                self.unreadable.add(image_id)
                self.info(f"skipped ({len(self.unreadable)} so far): {reason}")
        if self.bar is not None:
            self.bar.update()
        train = self.config.train
        if not self.active or self.writer is None or (step % train.log_every and step < train.steps):
            return
        values = {"step": step, "lr": learning_rate} | {name: value.item() for name, value in losses.items()}
        with (self.folder / "metrics.csv").open("a", encoding="utf-8") as file:
            file.write(",".join(f"{values[name]:.9g}" for name in COLUMNS) + "\n")
        seconds_per_step = (time.perf_counter() - self.start_time) / (step - self.start_step)
        images_per_second = train.batch_size / seconds_per_step
        for name in COLUMNS[1:]:
            self.writer.add_scalar(f"train/{name}", values[name], step)
        self.writer.add_scalar("train/images_per_second", images_per_second, step)
        numbers = "  ".join(f"{name} {values[name]:.4g}" for name in TERMINAL_COLUMNS)
        remaining = timedelta(seconds=round(seconds_per_step * (train.steps - step)))
        self.info(f"step {step}/{train.steps}  {numbers}  {images_per_second:.1f} images/s  {remaining} left")

    def log_evaluation(
        self,
        step: int,
        evaluation: Evaluation,
        results: list[dict[str, Any]],
        dataset: CocoDataset,
        unreadable: dict[int, str],
    ) -> None:
        """Write an evaluation to eval.json, detections.json, the terminal and TensorBoard."""
        if not self.active or self.writer is None:
            return
        metrics = evaluation.metrics
        self._write_evaluations([*self.evaluations(), {"step": step, **metrics}])
        write_text(self.folder / "detections.json", msgspec.json.encode(results).decode())  # six times as fast as json
        self.info(f"evaluation at step {step}\n{format_metrics(metrics)}")
        for name, value in metrics.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"val/{name}", value, step)
        for name, value in metrics["per_class"].items():
            if value is not None:
                self.writer.add_scalar(f"val_class/{name}", value, step)
        figure = plot_precision_recall(evaluation.precision)
        self.writer.add_figure("val/precision_recall_at_iou_50", figure, step)
        readable = [record for record in dataset.records if record.image_id not in unreadable]
        for record in readable[:: max(1, len(readable) // NUM_IMAGES)][:NUM_IMAGES]:
            image = Image.fromarray(read_image(record.path, (record.width, record.height)))
            confident = [r for r in results if r["image_id"] == record.image_id and r["score"] >= IMAGE_SCORE_THRESHOLD]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in confident)]
            labels = [dataset.names[dataset.category_ids.index(r["category_id"])] for r in confident]
            drawn = draw_boxes(image, boxes, labels, [r["score"] for r in confident])
            self.writer.add_image(f"detections/{record.path.name}", np.asarray(drawn), step, dataformats="HWC")
        self.writer.flush()

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

    def _lock_folder(self) -> None:
        """Lock the folder for the lifetime of this process."""
        self.lock = (self.folder / ".lock").open("w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit this lock
        except (BlockingIOError, PermissionError):
            raise RunFolderInUseError(
                f"{self.folder}: another process is training here; wait for it, or stop it"
            ) from None
        except OSError as error:  # some network file systems have no locks
            self.info(f"{self.folder} cannot be locked ({error.strerror}): make sure that only one run writes here")

    def _write_evaluations(self, entries: list[dict[str, Any]]) -> None:
        write_text(self.folder / "eval.json", json.dumps(entries, indent=1))

    def _read_rows(self) -> list[str]:
        """The complete lines of metrics.csv without the header. A kill may have truncated the last one."""
        path = self.folder / "metrics.csv"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [line for line in lines[1:] if line.count(",") == len(COLUMNS) - 1]


def check_run_folder(config: Config, resume: bool) -> None:
    """Raise RunFolderError if the folder is not empty or, with `resume`, if its run has other settings."""
    folder = config.run_dir
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise RunFolderError(
            f"{folder} is not empty; --resume continues its run, output_dir=FOLDER starts a run in another folder"
        )
    if not (folder / "config.yaml").exists():
        return
    try:
        old, new = load_config(folder / "config.yaml").flat(), config.flat()
    except ConfigError as error:
        raise RunFolderError(f"{folder} was started by another version of this program: {error}") from None
    changed = [
        f"{key} was {old.get(key)}, is {new[key]}"
        for key in new
        if old.get(key) != new[key] and key not in KEYS_WITHOUT_EFFECT
    ]
    if changed:
        raise RunFolderError(
            f"{folder} was started with other settings ({', '.join(changed)}); use the same settings or another "
            "output_dir"
        )
