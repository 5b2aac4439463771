"""What changes from step to step, and how a run begins: from scratch, from weights, or from a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from retina.config import Config
from retina.data.coco import CocoDataset
from retina.device import autocast
from retina.model import checkpoint
from retina.model.pretrained import load_pretrained
from retina.model.retinanet import RetinaNet
from retina.train.errors import RunError
from retina.train.logbook import Logbook
from retina.train.schedule import build_optimizer


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


def _about(config: Config, dataset: CocoDataset) -> dict[str, Any]:
    """What a checkpoint says about itself, in plain values."""
    categories = [[i, name] for i, name in zip(dataset.category_ids, dataset.names, strict=True)]
    return {"config": config.to_yaml(), "categories": categories}
