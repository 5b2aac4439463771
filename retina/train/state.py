"""The state of a run: everything that changes from step to step, and what a checkpoint stores of it.

A checkpoint is the dict `TrainState.state_dict() | checkpoint_metadata()`. train/loop.py saves it, in best.pt with an
empty "optimizer"; a finished run with train.keep=weights has only last.pt, see `evaluated_weights`. Its readers are
`TrainState.load_state_dict` here and `create_train_state` in start.py, when a run resumes, and `read_weights` in
model/weights.py, for evaluation and prediction. model/checkpoint.py writes and reads the file and does not depend
on the keys. A new key needs a default for older files in `load_state_dict`, or in `create_train_state` if it needs the
config. If no default is possible, increase FORMAT in that file: older files are then refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retina.config import Config, Train
from retina.data.coco import CocoDataset
from retina.model.retinanet import RetinaNet


@dataclass
class TrainState:
    """Everything that changes from step to step. A new field that a resumed run needs goes into both methods below."""

    model: RetinaNet
    ema_model: RetinaNet | None  # the moving average (EMA) of the weights, if train.ema is above 0
    optimizer: torch.optim.Optimizer
    ema_positives: Tensor  # float32 scalar: the moving average of the number of positive anchors
    precision: str  # of the network: bf16 or fp32; a resumed run must have the same
    train_data: str  # `data_digest` of the training set
    val_data: str  # and of the validation set
    step: int = 0  # steps done
    best: float = -1.0  # the highest train.best_metric of the evaluations
    evaluations_since_best: int = 0
    evaluated_step: int = 0  # the step of the last evaluation
    changes: list[dict[str, Any]] = field(default_factory=list)  # at resumes: step, key, from, to
    has_optimizer_state: bool = True  # else the run has ended, and cannot go on

    @property
    def eval_model(self) -> RetinaNet:
        """The model that is evaluated: the moving average if there is one."""
        return self.ema_model or self.model

    def has_stopped_early(self, config: Train) -> bool:
        """Whether the last `early_stop` evaluations were no new best."""
        return 0 < config.early_stop <= self.evaluations_since_best

    def has_ended(self, config: Train) -> bool:
        """Whether there is no step left to do."""
        return self.step == config.steps or self.has_stopped_early(config)

    def state_dict(self) -> dict[str, Any]:
        """The part of a checkpoint that changes from step to step: tensors and plain values only."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema_model.state_dict() if self.ema_model else {},
            "optimizer": self.optimizer.state_dict() if self.has_optimizer_state else {},
            "positives": self.ema_positives,
            "precision": self.precision,
            "train_data": self.train_data,
            "val_data": self.val_data,
            "step": self.step,
            "best": self.best,
            "since_best": self.evaluations_since_best,
            "evaluated": self.evaluated_step,
            "changes": self.changes,
        }

    def evaluated_weights(self) -> dict[str, Any]:
        """`state_dict` of a finished run with the weights of `eval_model` only."""
        return {**self.state_dict(), "model": self.eval_model.state_dict(), "ema": {}, "optimizer": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set this state to a checkpoint, which has the keys of `state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.ema_model:
            self.ema_model.load_state_dict(state["ema"] or state["model"])
        self.has_optimizer_state = bool(state["optimizer"])  # not in a finished run with train.keep=weights
        if self.has_optimizer_state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.ema_positives.copy_(state["positives"])
        self.step, self.best, self.evaluated_step = state["step"], state["best"], state["evaluated"]
        self.evaluations_since_best, self.changes = state.get("since_best", 0), list(state.get("changes", []))


def checkpoint_metadata(config: Config, dataset: CocoDataset) -> dict[str, Any]:
    """The part of a checkpoint that describes its run: the config as YAML, and [id, name] of each category.

    `build_detector` checks both against the config and data set that it is given.
    """
    return {"config": config.to_yaml(), "categories": [list(category) for category in dataset.categories]}


def data_digest(dataset: CocoDataset, evaluated: bool = False) -> str:
    """The SHA-256 of what counts of the images and annotations of a data set in training, or where it is evaluated.

    That is without the pixels, and in training without the areas.
    """
    file = dataset.file
    digest = hashlib.sha256("\n".join(file.file_names.tolist()).encode())
    columns = [file.image_ids, file.widths, file.heights, file.images, file.labels, file.boxes, file.crowd]
    for column in (*columns, file.areas) if evaluated else columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
