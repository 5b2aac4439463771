"""The state of a run: everything that changes from step to step, how it is created, and what a checkpoint stores of it.

A checkpoint is the dict `TrainState.state_dict() | checkpoint_metadata()`. train/loop.py saves it, in best.pt with an
empty "optimizer"; a finished run with train.keep=weights has only last.pt, see `evaluated_weights`. Its readers are
`TrainState.load_state_dict` and `_check_saved_state` here, when a run resumes, and `read_weights` in
model/weights.py, for evaluation and prediction. model/checkpoint.py writes and reads the file and does not depend
on the keys. A new key needs a default for older files in `load_state_dict`, or in `create_train_state` if it needs the
config. If no default is possible, increase FORMAT in that file: older files are then refused.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retina.config import KEYS_TO_CHANGE, KEYS_WITHOUT_EFFECT, Config, Train
from retina.config_file import KEYS_OF_PLACE, changed_keys, config_from_yaml
from retina.data.coco import CocoDataset
from retina.device import autocast, compile_network
from retina.model import checkpoint
from retina.model.pretrained import load_pretrained
from retina.model.retinanet import RetinaNet
from retina.train.distributed import broadcast, world_size
from retina.train.errors import RunError
from retina.train.logbook import Logbook, describe_changes
from retina.train.schedule import build_optimizer, learning_rate


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
    changes: list[dict[str, Any]] = field(default_factory=list)  # by --change: step, key, from, to

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
            "optimizer": self.optimizer.state_dict(),
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
        if state["optimizer"]:  # empty in a finished run with train.keep=weights
            self.optimizer.load_state_dict(state["optimizer"])
        self.ema_positives.copy_(state["positives"])
        self.step, self.best, self.evaluated_step = state["step"], state["best"], state["evaluated"]
        self.evaluations_since_best, self.changes = state.get("since_best", 0), list(state.get("changes", []))


def checkpoint_metadata(config: Config, dataset: CocoDataset) -> dict[str, Any]:
    """The part of a checkpoint that describes its run: the config as YAML, and [id, name] of each category.

    `build_detector` checks both against the config and data set that it is given.
    """
    return {"config": config.to_yaml(), "categories": [list(category) for category in dataset.categories]}


def data_digest(dataset: CocoDataset) -> str:
    """The SHA-256 of the images and annotations that a data set was read from, without the pixels."""
    file = dataset.file
    digest = hashlib.sha256("\n".join(file.file_names.tolist()).encode())
    for column in (file.image_ids, file.widths, file.heights, file.images, file.labels, file.boxes, file.crowd):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def newest_step(run: Path) -> int | None:
    """The step of the newest valid checkpoint of a run folder; None if there is none."""
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        with contextlib.suppress(checkpoint.CheckpointError):
            return int(checkpoint.load(run / name)["step"])
    return None


def create_train_state(
    config: Config, dataset: CocoDataset, val_set: CocoDataset, device: torch.device, resume: bool, log: Logbook
) -> TrainState:
    """The state at the start of a run: the newest valid checkpoint of its folder, pretrained or random weights.

    Raises RunError for a checkpoint or settings that do not fit, CheckpointError if no checkpoint of the run can be
    read, and for `model.weights` what `load_pretrained` does.
    """
    torch.manual_seed(config.seed)
    model: RetinaNet = RetinaNet(config, dataset.num_classes)
    saved, refused = checkpoint.load_newest(config.run_dir) if resume and log.active else (None, [])
    for reason in refused:
        log.info(f"refused {reason}")
    saved = broadcast(saved)  # the log checks later that all see its disk
    if world_size() > 1:
        model = _synchronize_batch_norm(model, config, device)
    if saved is None:
        _initialize_weights(model, config, dataset.names, log)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(
        model,
        copy.deepcopy(model).requires_grad_(False) if config.train.ema else None,
        build_optimizer(model, config.train),
        torch.tensor(config.loss.ema_start, device=device),
        "bf16" if autocast(device, config.train.precision)._enabled else "fp32",
        data_digest(dataset),
        data_digest(val_set),
    )
    if saved is None and resume:
        log.info(f"no checkpoint in {config.run_dir}: the run starts at step 0")
    if saved is not None:
        _check_saved_state(saved, state, config, dataset)
        state.load_state_dict(saved)
        log.info(f"resumed after step {state.step}")
        _note_other_data(saved, state, dataset, val_set, log)
        for change in _changes(config_from_yaml(saved["config"]), config, state.step):
            state.changes.append(change)
            log.info(f"from step {state.step} on: {change['key']} {change['from']} -> {change['to']}")
    if config.train.compile:
        # Graphs overwrite the gradients of the micro-batch before; with several processes they have not been tried.
        compile_network(model, device, graphs=config.train.accumulate == 1 and world_size() == 1)
    peak = config.train.lr * config.train.batch_size / config.train.reference_batch
    log.info(
        f"{device}, {state.precision}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; learning "
        f"rate {config.train.lr:g} for {config.train.reference_batch} images a step, {peak:g} for "
        f"{config.train.batch_size}"
    )
    for line in _surprising_settings(config):
        log.info(line)
    return state


def _surprising_settings(config: Config) -> Iterator[str]:
    """A line for each setting that does not do what it seems to do, because of another one."""
    train, data = config.train, config.data
    if train.warmup_steps >= train.steps:
        last = learning_rate(train.steps - 1, train)
        yield (
            f"the warm-up is as long as the run: the learning rate only rises, to {last:.3g} in the last of "
            f"{train.steps} steps; train.warmup_steps is {train.warmup_steps}"
        )
    if train.early_stop and (train.eval_every == 0 or train.eval_every >= train.steps):
        yield f"train.early_stop={train.early_stop} does nothing: the only evaluation is at the end (train.eval_every)"
    if data.max_side < (largest := max(*data.short_side, data.eval_short_side or 0)):
        yield f"data.max_side={data.max_side} is below a short side of {largest}: no image becomes that large"


def _note_other_data(
    saved: dict[str, Any], state: TrainState, train_set: CocoDataset, val_set: CocoDataset, log: Logbook
) -> None:
    """Say it, and write it to changes.json, if the annotations have changed since the checkpoint."""
    if saved.get("train_data", state.train_data) != state.train_data:
        log.info(
            f"the training annotations have changed since then ({train_set.annotations}): the run goes on with the new "
            "ones, and no longer ends as an uninterrupted run does"
        )
        change = {"key": "train_data", "from": saved["train_data"], "to": state.train_data}
        state.changes.append({"step": state.step} | change)
    if saved.get("val_data", state.val_data) != state.val_data:
        log.info(
            f"the validation annotations have changed since then ({val_set.annotations}): the AP of the next "
            "evaluations cannot be compared with those before, and the next one is the best so far"
        )
        state.best, state.evaluations_since_best = -1.0, 0
        change = {"key": "val_data", "from": saved["val_data"], "to": state.val_data}
        state.changes.append({"step": state.step} | change)


def _changes(old: Config, new: Config, step: int) -> list[dict[str, Any]]:
    """What --change changed since the checkpoint. `check_run_folder` has checked that it was asked for."""
    before, after = old.flat(), new.flat()
    return [
        {"step": step, "key": key, "from": before[key], "to": after[key]}
        for key in KEYS_TO_CHANGE
        if before[key] != after[key]
    ]


def _synchronize_batch_norm(model: RetinaNet, config: Config, device: torch.device) -> RetinaNet:
    if config.model.norm != "batch":
        return model
    if device.type == "cpu":
        raise RunError(
            "model.norm=batch over several processes needs CUDA, where BatchNorm can be synchronized; "
            "on the CPU use model.norm=group"
        )
    synchronized: RetinaNet = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return synchronized


def _initialize_weights(model: RetinaNet, config: Config, names: list[str], log: Logbook) -> None:
    """Load `model.weights`. Raises RunError if it is null and the settings would freeze random values."""
    if config.model.weights is not None:
        log.info(load_pretrained(model, config, config.model.weights, names)[1])
    elif config.model.norm.startswith("frozen"):
        raise RunError(
            f"model.norm={config.model.norm} keeps the statistics of pretrained weights, and model.weights is "
            "null; from scratch use model.norm=batch or group and model.frozen_stages=-1"
        )
    elif config.model.frozen_stages >= 0:
        raise RunError(
            f"model.frozen_stages={config.model.frozen_stages} keeps the weights of the first stages, and "
            "model.weights is null, so they would stay random; from scratch use model.frozen_stages=-1"
        )


def _check_saved_state(saved: dict[str, Any], state: TrainState, config: Config, dataset: CocoDataset) -> None:
    """`state`: of the new process, before it is loaded."""
    if saved["precision"] != state.precision:
        raise RunError(
            f"{config.run_dir} was trained in {saved['precision']}; on this machine, train.precision="
            f"{config.train.precision} would continue in {state.precision}"
        )
    if config.train.steps < saved["step"]:
        raise RunError(f"{config.run_dir} has {saved['step']} steps done: train.steps={config.train.steps} is too few")
    before = config_from_yaml(saved["config"])
    moved = KEYS_OF_PLACE if _has_equal_data(saved, state) else ("name",)
    if changed := changed_keys(before, config, (*KEYS_WITHOUT_EFFECT, *KEYS_TO_CHANGE, *moved)):
        raise RunError(
            f"the checkpoint in {config.run_dir} is of a run with other settings "
            f"({describe_changes(before, config, changed)}); use the same settings, or another output_dir"
        )
    ended_early = 0 < config.train.early_stop <= saved.get("since_best", 0)
    if not saved["optimizer"] and saved["step"] < config.train.steps and not ended_early:
        raise RunError(
            f"{config.run_dir}: the checkpoint of step {saved['step']} has weights only, because the run ended with "
            "train.keep=weights, or because it is a best.pt; without the state of the optimizer it cannot continue: "
            "start a new run with model.weights=FILE"
        )
    if ended_early and _changes(before, config, saved["step"]):
        raise RunError(
            f"{config.run_dir} ended early after step {saved['step']} (train.early_stop={config.train.early_stop}), "
            "so a --change would do nothing; start a new run with model.weights=FILE"
        )
    if [list(pair) for pair in saved["categories"]] != checkpoint_metadata(config, dataset)["categories"]:
        raise RunError(f"{config.run_dir}: the checkpoint was trained on other categories: {saved['categories']}")


def _has_equal_data(saved: dict[str, Any], state: TrainState) -> bool:
    """Whether both sets have the annotations of the checkpoint, so that they may be at another place now."""
    now = {"train_data": state.train_data, "val_data": state.val_data}
    return all(saved.get(key) == value for key, value in now.items())
