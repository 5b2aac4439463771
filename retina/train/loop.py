"""Training: build everything, then train_step, repeated; `train(config)` -> the metrics of the last evaluation.

Whatever a step uses is a function of (seed, step) and of the checkpoint before it. So a run that is killed at any
instant and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retina.config import Config
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches
from retina.evaluate.coco import run_detector, score
from retina.model import checkpoint
from retina.train.distributed import _gather, _processes
from retina.train.errors import RunError
from retina.train.logbook import Logbook, check_folder
from retina.train.schedule import learning_rate, update_average
from retina.train.state import Progress, _about, _start
from retina.train.step import train_step


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Train as `config` says, in `config.run_dir`; returns the entry of the last evaluation in eval.json.

    Under torchrun every process calls it. SIGTERM and Ctrl-C write a checkpoint and end cleanly.
    Raises RunError, DataError, WeightsError, FileNotFoundError; each says what to do about it.
    """
    check_folder(config, resume)  # before the processes meet, so that none sees what another has begun
    with _processes() as (rank, world, device), Logbook(config, rank) as log, _stop_signals() as stop:
        if config.train.batch_size % (world * config.train.accumulate):
            raise RunError(
                f"train.batch_size {config.train.batch_size} does not divide among {world} processes "
                f"of train.accumulate {config.train.accumulate}"
            )
        train_set, val_set = open_datasets(config, log)
        progress = _start(config, train_set, device, resume, log)
        model: nn.Module = DistributedDataParallel(progress.model) if world > 1 else progress.model
        log.begin(progress.step)
        if progress.evaluated < progress.step and _due(progress.step, config.train.eval_every, config):
            _evaluate(progress, val_set, config, device, log)  # a signal came just before it
            if rank == 0:
                checkpoint.save_last(config.run_dir, progress.state() | _about(config, train_set))
        for batches in train_batches(train_set, config, progress.step, rank, world):
            batches = [batch.to(device) for batch in batches]
            try:
                losses = train_step(
                    model,
                    progress.optimizer,
                    batches,
                    train_set.num_classes,
                    progress.positives,
                    config,
                    progress.step,
                    bool(stop),
                    _due(progress.step + 1, config.train.log_every, config),
                )
            except RunError as error:
                image_ids = _gather([i for batch in batches for i in batch.image_ids])
                path = log.save_batch(progress.step + 1, image_ids)
                raise RunError(f"{error}; the image ids are in {path}") from None
            if progress.averaged:
                update_average(progress.averaged, progress.model, config.train.ema, progress.step)
            progress.step += 1
            stopping = bool(losses.pop("stop"))
            log.step(progress.step, losses, learning_rate(progress.step - 1, config.train), batches)
            if not stopping and _due(progress.step, config.train.eval_every, config):
                _evaluate(progress, val_set, config, device, log)
            if rank == 0 and (stopping or _due(progress.step, config.train.checkpoint_every, config)):
                checkpoint.save_last(config.run_dir, progress.state() | _about(config, train_set))
            if stopping:
                log.say(f"stopped by a signal after step {progress.step}; go on with --resume")
                break
        return (log.evaluations() or [{}])[-1]


def open_datasets(config: Config, log: Logbook) -> tuple[CocoDataset, CocoDataset]:
    """Training and validation data; RunError where their categories differ."""
    data = config.data
    train_set = CocoDataset(data.train_annotations, data.train_images, crowd=data.crowd, empty_images=data.empty_images)
    val_set = CocoDataset(data.val_annotations, data.val_images)
    if (train_set.category_ids, train_set.names) != (val_set.category_ids, val_set.names):
        raise RunError(
            f"{data.train_annotations} and {data.val_annotations} have different categories: "
            f"{dict(zip(train_set.category_ids, train_set.names, strict=True))} and "
            f"{dict(zip(val_set.category_ids, val_set.names, strict=True))}"
        )
    for name, dataset in (("train", train_set), ("val", val_set)):
        boxes = sum(len(record.boxes) for record in dataset.records)
        log.say(
            f"{name}: {len(dataset.records)} images, {boxes} boxes, {dataset.num_classes} classes ({dataset.folder})"
        )
        for note in dataset.notes:
            log.say(f"{name}: {note}")
    return train_set, val_set


def _evaluate(progress: Progress, dataset: CocoDataset, config: Config, device: torch.device, log: Logbook) -> None:
    results, unreadable = run_detector(progress.averaged or progress.model, dataset, config, device)
    progress.evaluated = progress.step
    if not log.active:
        return
    for sentence in unreadable.values():
        log.say(f"not evaluated: {sentence}")
    evaluation = score(results, dataset, without=unreadable)
    log.evaluation(progress.step, evaluation, results, dataset, unreadable)
    ap = evaluation.metrics["AP"] or 0.0
    if ap > progress.best:
        progress.best = ap
        state = {**progress.state(), "optimizer": {}}
        checkpoint.save(config.run_dir / checkpoint.BEST, state | _about(config, dataset))


def _due(done: int, every: int, config: Config) -> bool:
    return done == config.train.steps or (every > 0 and done % every == 0)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM or Ctrl-C has come; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
