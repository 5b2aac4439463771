"""Run a model on a data set -> detections -> the twelve COCO numbers and the AP of each class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from retina.analysis.results_file import results_columns
from retina.analysis.scoring import Evaluation, score
from retina.config import COCO_METRICS, Config
from retina.data.batch import Batch
from retina.data.coco import CocoDataset
from retina.data.loader import eval_batches
from retina.evaluate.detections import on_image
from retina.evaluate.inference import detect_batches
from retina.model.retinanet import RetinaNet


@torch.inference_mode()
def inference_on_dataset(
    model: RetinaNet, dataset: CocoDataset, config: Config, device: torch.device, progress: Any = iter
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Detections on the whole data set in COCO results format, and the reason for each image that could not be read.

    Boxes are xywh in pixels of the original image, category ids are those of the data set. The reasons are by image id.
    Under torch.distributed, each process runs a part of the images and all return all results. `progress` wraps the
    iterable of batches.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    image_sizes, categories = dataset.records.sizes(), dataset.categories
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    unreadable: dict[int, str] = {}
    batches: Iterable[Batch] = progress(eval_batches(dataset, config, rank, world))
    for batch, batch_detections in detect_batches(model, batches, config, device):
        unreadable |= batch.unreadable
        for image_id, size, detections in zip(batch.image_ids, batch.sizes, batch_detections, strict=True):
            if image_id not in batch.unreadable:
                results += on_image(detections, size, image_sizes[image_id], categories).coco_results(image_id)
    model.train(was_training)
    if world > 1:
        gathered: list[Any] = [None] * world
        distributed.all_gather_object(gathered, (results, unreadable))
        results = [entry for part, _ in gathered for entry in part]
        unreadable = {image_id: reason for _, part in gathered for image_id, reason in part.items()}
    return sorted(results, key=lambda entry: (entry["image_id"], -entry["score"])), unreadable


def evaluate_detections(results: list[dict[str, Any]], dataset: CocoDataset, exclude: Iterable[int] = ()) -> Evaluation:
    """The COCO numbers of `results` on the images of `dataset` by the quick scorer, see analysis/scoring.py.

    `exclude`: ids of images that are not counted, for example because they could not be read.
    """
    return score(dataset.file, results_columns(results, dataset.file), exclude)


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics as a table for the terminal, in percent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = []
    for names in (COCO_METRICS[:6], COCO_METRICS[6:]):
        lines.append("  ".join(f"{name:>6}" for name in names))
        lines.append("  ".join(f"{percent(metrics[name]):>6}" for name in names))
    width = max([len(name) for name in metrics["per_class"]] + [5])
    lines += ["", f"{'class':<{width}}      AP"]
    lines += [f"{name:<{width}}  {percent(value):>6}" for name, value in metrics["per_class"].items()]
    return "\n".join(lines)
