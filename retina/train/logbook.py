"""The run folder: everything a training leaves behind, apart from the tensors' content.

    config.yaml      the resolved configuration
    last.pt previous.pt best.pt
    metrics.csv      one line a logged step; no clock in it, so equal runs write equal bytes
    eval.json        a list with the COCO numbers of each evaluation
    events.out.*     TensorBoard: losses, rate, positives, images/s, AP, pictures, precision-recall curves

Only process 0 writes; on the others every method is silent.
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

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from retina.atomic_files import write_text
from retina.config import NEUTRAL, Config
from retina.config_file import ConfigError, load
from retina.data.coco import CocoDataset, read_image
from retina.data.loader import Batch
from retina.evaluate.coco import Evaluation, table
from retina.plots.boxes import draw_boxes
from retina.plots.run import precision_recall
from retina.train.errors import RunFolderBusy, RunFolderError

COLUMNS = ("step", "loss", "loss_cls", "loss_box", "loss_pos", "loss_neg", "lr", "positives", "grad_norm")
SHOWN = ("loss", "loss_cls", "loss_box", "lr", "positives", "grad_norm")  # of these, on the terminal
PICTURES, PICTURE_SCORE = 6, 0.3


class Logbook:
    """Writes nothing before `begin`; closed as a context manager."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.active, self.folder = config, rank == 0, config.run_dir
        self.started, self.at_start = time.perf_counter(), 0
        self.unreadable: set[int] = set()
        self.writer: SummaryWriter | None = None
        self.lock: TextIO | None = None
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self.lock is not None:
            self.lock.close()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def begin(self, step: int) -> None:
        """Open the files for a run that goes on after `step`: what a killed run wrote beyond it is cut off."""
        self.at_start = step
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        write_text(self.folder / "config.yaml", self.config.to_yaml())
        rows = [",".join(COLUMNS), *(row for row in self._rows() if int(row.split(",", 1)[0]) <= step)]
        write_text(self.folder / "metrics.csv", "\n".join(rows) + "\n")
        self._write_evaluations([entry for entry in self.evaluations() if entry["step"] <= step])
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        self.writer.add_text("config", f"```yaml\n{self.config.to_yaml()}\n```", step)
        if sys.stderr.isatty():  # where tqdm draws
            self.bar = tqdm(total=self.config.train.steps, initial=step, unit="step", dynamic_ncols=True)
        self.started = time.perf_counter()

    def step(self, done: int, losses: dict[str, Tensor], rate: float, batches: list[Batch]) -> None:
        """Count a step; at every `log_every`-th and the last, write its numbers."""
        for image_id, sentence in (item for batch in batches for item in batch.unreadable.items()):
            if image_id not in self.unreadable:
                self.unreadable.add(image_id)
                self.say(f"skipped ({len(self.unreadable)} so far): {sentence}")
        if self.bar is not None:
            self.bar.update()
        if (
            not self.active
            or self.writer is None
            or (done % self.config.train.log_every and done < self.config.train.steps)
        ):
            return
        values = {"step": done, "lr": rate} | {name: value.item() for name, value in losses.items()}
        with (self.folder / "metrics.csv").open("a", encoding="utf-8") as file:
            file.write(",".join(f"{values[name]:.9g}" for name in COLUMNS) + "\n")
        seconds = (time.perf_counter() - self.started) / (done - self.at_start)
        speed = self.config.train.batch_size / seconds
        for name in COLUMNS[1:]:
            self.writer.add_scalar(f"train/{name}", values[name], done)
        self.writer.add_scalar("train/images_per_second", speed, done)
        numbers = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN)
        left = timedelta(seconds=round(seconds * (self.config.train.steps - done)))
        self.say(f"step {done}/{self.config.train.steps}  {numbers}  {speed:.1f} images/s  {left} left")

    def evaluation(
        self,
        done: int,
        evaluation: Evaluation,
        results: list[dict[str, Any]],
        dataset: CocoDataset,
        unreadable: dict[int, str],
    ) -> None:
        """Write one evaluation everywhere it is looked for."""
        if not self.active or self.writer is None:
            return
        metrics = evaluation.metrics
        self._write_evaluations([*self.evaluations(), {"step": done, **metrics}])
        write_text(self.folder / "detections.json", json.dumps(results))
        self.say(f"evaluation at step {done}\n{table(metrics)}")
        for name, value in metrics.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"val/{name}", value, done)
        for name, value in metrics["per_class"].items():
            if value is not None:
                self.writer.add_scalar(f"val_class/{name}", value, done)
        self.writer.add_figure("val/precision_recall_at_iou_50", precision_recall(evaluation.precision), done)
        shown = [record for record in dataset.records if record.image_id not in unreadable]
        for record in shown[:: max(1, len(shown) // PICTURES)][:PICTURES]:
            picture = Image.fromarray(read_image(record.path, (record.width, record.height)))
            found = [r for r in results if r["image_id"] == record.image_id and r["score"] >= PICTURE_SCORE]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in found)]
            labels = [dataset.names[dataset.category_ids.index(r["category_id"])] for r in found]
            drawn = draw_boxes(picture, boxes, labels, [r["score"] for r in found])
            self.writer.add_image(f"detections/{record.path.name}", np.asarray(drawn), done, dataformats="HWC")
        self.writer.flush()

    def save_batch(self, done: int, image_ids: list[int]) -> Path:
        """The image ids of a step that went wrong, for the person who looks for the cause."""
        path = self.folder / f"nonfinite_step_{done}.json"
        if self.active:
            write_text(path, json.dumps({"step": done, "image_ids": image_ids}))
        return path

    def evaluations(self) -> list[dict[str, Any]]:
        """The entries of eval.json; empty before the first evaluation."""
        path = self.folder / "eval.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def _lock(self) -> None:
        """Keeps other processes out of the folder for as long as this one lives."""
        self.lock = (self.folder / ".lock").open("w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by a loader's workers
        except (BlockingIOError, PermissionError):
            raise RunFolderBusy(f"{self.folder}: another process is training here; wait for it, or stop it") from None
        except OSError as error:  # some network disks have no locks
            self.say(f"{self.folder} cannot be locked ({error.strerror}): see to it that only one training writes here")

    def _write_evaluations(self, entries: list[dict[str, Any]]) -> None:
        write_text(self.folder / "eval.json", json.dumps(entries, indent=1))

    def _rows(self) -> list[str]:
        """Whole lines of metrics.csv; the last one is cut where a kill left half of it."""
        path = self.folder / "metrics.csv"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [line for line in lines[1:] if line.count(",") == len(COLUMNS) - 1]


def check_folder(config: Config, resume: bool) -> None:
    """RunFolderError for a folder that holds another run, or at a resume one that was started differently."""
    folder = config.run_dir
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise RunFolderError(
            f"{folder} is not empty; --resume continues what is there, output_dir=FOLDER starts elsewhere"
        )
    if not (folder / "config.yaml").exists():
        return
    try:
        before, now = load(folder / "config.yaml").flat(), config.flat()
    except ConfigError as error:
        raise RunFolderError(f"{folder} was started by another version of this program: {error}") from None
    changed = [key for key in now if before.get(key) != now[key] and key not in NEUTRAL]
    if changed:
        said = ", ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in changed)
        raise RunFolderError(
            f"{folder} was started with other settings ({said}); give the same ones, or another output_dir"
        )
