"""Training: build everything, then one visible step, repeated; `train(config)` -> the metrics of the last evaluation.

Whatever a step uses is a function of (seed, step) and of the checkpoint before it. So a run that is killed at any
instant and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from retina import checkpoint
from retina.assign import assign
from retina.config import Config
from retina.criterion import (
    advance_average,
    class_loss_of_positives,
    count_positives,
    detection_loss,
    normalizer,
)
from retina.data.coco import CocoDataset
from retina.data.loader import Batch, train_batches
from retina.device import autocast, pick_device
from retina.evaluate import run_detector, score
from retina.logbook import Logbook, RunError, check_folder
from retina.model.anchors import make_anchors
from retina.model.pretrained import load_pretrained
from retina.model.retinanet import RetinaNet
from retina.schedule import build_optimizer, learning_rate, update_average


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    num_classes: int,
    average: Tensor,
    config: Config,
    step: int,
    stop: bool = False,
    split: bool = False,
) -> dict[str, Tensor]:
    """One step over this process's micro-batches; returns float32 scalars for the log, and whether to `stop`.

    `step` counts from 0. `average` is the moving average of positives, advanced in place. `stop` asks all processes to
    end; `split` asks for the class loss of positives and of negatives (loss_pos, loss_neg).
    Raises RunError, before anything is updated, if the loss is not finite.
    """
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    anchors = [make_anchors(config.anchors, *batch.images.shape[2:], batch.images.device) for batch in batches]
    assignments = [
        assign(boxes, batch.targets, batch.sizes, num_classes, config.assign)
        for boxes, batch in zip(anchors, batches, strict=True)
    ]
    positives = [count_positives(assignment, num_classes) for assignment in assignments]
    shared = torch.stack([torch.cat(positives).sum(), average.new_tensor(stop)])
    if world > 1:
        distributed.all_reduce(shared)  # the positives of the global batch, and whether anyone wants to stop

    totals: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        divisor_N = normalizer(positives[i], shared[0], config.train.batch_size, average, config.loss.normalizer)
        divisor_N = divisor_N / world  # DDP takes the mean over processes, this loss is a sum over them
        apart = isinstance(model, DistributedDataParallel) and i + 1 < len(batches)
        with model.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
            images = batch.normalized().contiguous(memory_format=torch.channels_last)
            with autocast(images.device, config.train.precision):
                outputs = model(images)
            losses = detection_loss(
                outputs, anchors[i], assignments[i], divisor_N, config.loss, config.detect.max_ratio
            )
            if split:
                losses["loss_pos"] = class_loss_of_positives(
                    outputs, anchors[i], assignments[i], divisor_N, config.loss
                )
            torch.autograd.backward(losses["loss"])
        totals = {name: totals.get(name, 0) + loss.detach() / world for name, loss in losses.items()}
    if world > 1:  # each process has its part of the sum; now all know the whole, and stop together if it is not finite
        for loss in totals.values():
            distributed.all_reduce(loss)
    if split:
        totals["loss_neg"] = totals["loss_cls"] - totals["loss_pos"]
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    totals["grad_norm"] = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(totals["loss"] + totals["grad_norm"]):
        named = ", ".join(f"{name} {value.item()}" for name, value in totals.items())
        raise RunError(f"step {step + 1}: the loss or its gradient is not finite ({named}); nothing was updated")

    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config.train)
    if config.train.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, config.train.clip_norm, totals["grad_norm"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average.copy_(advance_average(average, shared[0], config.loss.ema_momentum))
    return totals | {"positives": shared[0] / config.train.batch_size, "stop": shared[1]}


@dataclass
class Progress:
    """What a run has reached: everything that changes from step to step."""

    model: RetinaNet
    averaged: RetinaNet | None  # the weights' moving average, where train.ema asks for one
    optimizer: torch.optim.Optimizer
    positives: Tensor  # the moving average of positives
    precision: str  # in which the network runs: bf16 or fp32
    step: int = 0
    best: float = -1.0
    evaluated: int = 0  # the step of the last evaluation

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.averaged.state_dict() if self.averaged else {},
            "optimizer": self.optimizer.state_dict(),
            "positives": self.positives,
            "precision": self.precision,
            "step": self.step,
            "best": self.best,
            "evaluated": self.evaluated,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.averaged:
            self.averaged.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.positives.copy_(state["positives"])
        self.step, self.best, self.evaluated = state["step"], state["best"], state["evaluated"]


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


def _start(config: Config, dataset: CocoDataset, device: torch.device, resume: bool, log: Logbook) -> Progress:
    """A fresh model, or the newest valid checkpoint of the run folder."""
    torch.manual_seed(config.seed)
    model: RetinaNet = RetinaNet(config, dataset.num_classes)
    state, refused = checkpoint.load_newest(config.run_dir) if resume and log.active else (None, [])
    if distributed.is_initialized():
        shared = [state]
        distributed.broadcast_object_list(shared)  # the other machines need not see process 0's disk
        state = shared[0]
        if config.model.norm == "batch":
            if device.type == "cpu":
                raise RunError(
                    "model.norm=batch over several processes needs CUDA, whose BatchNorm can be synchronised; "
                    "on the CPU use model.norm=group"
                )
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    for sentence in refused:
        log.say(f"refused {sentence}")
    if state is None:
        if config.model.weights is not None:
            log.say(load_pretrained(model, config.model.backbone, config.model.weights, dataset.names)[1])
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
    precision = "bf16" if autocast(device, config.train.precision)._enabled else "fp32"
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = Progress(
        model,
        copy.deepcopy(model).requires_grad_(False) if config.train.ema else None,
        build_optimizer(model, config.train),
        torch.tensor(config.loss.ema_start, device=device),
        precision,
    )
    if state is not None:
        if state["precision"] != precision:
            raise RunError(
                f"{config.run_dir} was trained in {state['precision']}; on this machine, train.precision="
                f"{config.train.precision} would go on in {precision}"
            )
        if [list(pair) for pair in state["categories"]] != _about(config, dataset)["categories"]:
            raise RunError(f"{config.run_dir}: the checkpoint was trained on other categories: {state['categories']}")
        progress.restore(state)
        log.say(f"resumed after step {progress.step}")
    if config.train.compile:
        model.compile()
    peak = config.train.lr * config.train.batch_size / config.train.reference_batch
    log.say(
        f"{device}, {precision}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; learning rate "
        f"{config.train.lr:g} for {config.train.reference_batch} images a step, {peak:g} for {config.train.batch_size}"
    )
    return progress


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


def _about(config: Config, dataset: CocoDataset) -> dict[str, Any]:
    """What a checkpoint says about itself, in plain values."""
    categories = [[i, name] for i, name in zip(dataset.category_ids, dataset.names, strict=True)]
    return {"config": config.to_yaml(), "categories": categories}


def _gather(mine: list[int]) -> list[int]:
    """Of all processes, in their order."""
    if not distributed.is_initialized():
        return mine
    parts: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, mine)
    return [entry for part in parts for entry in part]


def _due(done: int, every: int, config: Config) -> bool:
    return done == config.train.steps or (every > 0 and done % every == 0)


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world size, device); under torchrun joins the other processes, and leaves them at the end."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, pick_device()
        return
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size(), device
    finally:
        distributed.destroy_process_group()


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
