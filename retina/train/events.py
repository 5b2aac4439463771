"""TensorBoard events of a run: numbers, precision-recall curves, and images with their detections."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from retina.analysis.scoring import Evaluation
from retina.atomic_files import named_errors
from retina.data.coco import CocoDataset, read_image
from retina.plots.boxes import draw_boxes
from retina.plots.run import plot_precision_recall

NUM_IMAGES, IMAGE_SCORE_THRESHOLD = 6, 0.3  # detections drawn


class EventFile:
    """Every method that writes may raise an OSError, also one of a write before: a thread of TensorBoard writes."""

    def __init__(self, folder: Path, step: int, config_text: str) -> None:
        """A new file in `folder`. TensorBoard hides the events of older files that are later than `step`."""
        self.errors_name = folder / "events.out.tfevents"  # TensorBoard adds the time, the machine and the process
        self.thread_hook = threading.excepthook
        # TensorBoard raises the error of its thread again in this one. Its traceback is not printed.
        threading.excepthook = self._print_error_of_thread
        try:
            with named_errors(self.errors_name):
                self.writer = SummaryWriter(str(folder), purge_step=step + 1)
                self.writer.add_text("config", f"```yaml\n{config_text}\n```", step)
        except OSError:
            threading.excepthook = self.thread_hook
            raise

    def add_scalars(self, group: str, values: dict[str, float], step: int) -> None:
        """Add a number for each name, as `group`/name."""
        with named_errors(self.errors_name):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def add_evaluation(
        self,
        step: int,
        evaluation: Evaluation,
        results: list[dict[str, Any]],
        dataset: CocoDataset,
        unreadable: dict[int, str],
    ) -> None:
        """Add the numbers, the precision-recall curves, and some of the readable images with their detections."""
        metrics = evaluation.metrics
        self.add_scalars("val", {name: value for name, value in metrics.items() if isinstance(value, float)}, step)
        per_class = {name: value for name, value in metrics["per_class"].items() if value is not None}
        self.add_scalars("val_class", per_class, step)
        with named_errors(self.errors_name):
            figure = plot_precision_recall(evaluation.precision)
            self.writer.add_figure("val/precision_recall_at_iou_50", figure, step)
            readable = [record for record in dataset.records if record.image_id not in unreadable]
            for record in readable[:: max(1, len(readable) // NUM_IMAGES)][:NUM_IMAGES]:
                image = Image.fromarray(read_image(record.path, (record.width, record.height)))
                confident = [
                    r for r in results if r["image_id"] == record.image_id and r["score"] >= IMAGE_SCORE_THRESHOLD
                ]
                boxes = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in confident)]
                labels = [dataset.names[dataset.category_ids.index(r["category_id"])] for r in confident]
                drawn = draw_boxes(image, boxes, labels, [r["score"] for r in confident])
                tag = f"detections/{record.path.as_posix().removeprefix(f'{dataset.folder.as_posix()}/')}"
                self.writer.add_image(tag, np.asarray(drawn), step, dataformats="HWC")
            self.writer.flush()

    def close(self) -> None:
        try:
            with named_errors(self.errors_name):
                self.writer.close()
        finally:
            threading.excepthook = self.thread_hook

    def _print_error_of_thread(self, error: threading.ExceptHookArgs) -> None:
        if not hasattr(error.thread, "exception"):  # TensorBoard's thread has it
            self.thread_hook(error)
