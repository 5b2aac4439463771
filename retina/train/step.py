"""One training step on one screen: match, forward, loss, backward, check, update."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from retina.assign import assign
from retina.config import Config
from retina.criterion import (
    advance_average,
    class_loss_of_positives,
    count_positives,
    detection_loss,
    normalizer,
)
from retina.data.loader import Batch
from retina.device import autocast
from retina.model.anchors import make_anchors
from retina.train.errors import RunError
from retina.train.schedule import learning_rate


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
