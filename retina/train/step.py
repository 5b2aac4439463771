"""One training step on one screen: match, forward, loss, backward, check, update.

On CUDA the host never waits for the device within a step. So it prepares the next step while the device computes this
one. What the host must know of a step, train/step_flags.py reads later.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from retina.assign import assign
from retina.config import Config
from retina.criterion import count_positives, detection_loss, normalizer, positive_class_loss, update_ema_positives
from retina.data.batch import Batch
from retina.device import autocast
from retina.model.anchors import make_anchors
from retina.train.distributed import rank, world_size
from retina.train.schedule import learning_rate


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    num_classes: int,
    ema_positives: Tensor,
    config: Config,
    step: int,
    stop: bool = False,
    log_loss_parts: bool = False,
) -> dict[str, Tensor]:
    """One step over the micro-batches of this process.

    Args:
        model: the network, or DistributedDataParallel around it.
        optimizer: of its parameters, with `fused=True`, as from `build_optimizer`; its learning rate is set here.
        batches: `train.accumulate` micro-batches, on the device of the model.
        num_classes: K.
        ema_positives: float32 scalar, the moving average of the number of positive anchors; updated in place.
        config: of the run.
        step: counts from 0. torch's generator is seeded with it.
        stop: this process asks all processes to end after the step.
        log_loss_parts: compute the class loss of the positive and of the negative anchors too.

    Returns: float32 scalars on the device. For the log: loss, loss_cls, loss_box, grad_norm, positives (per image) and,
        with `log_loss_parts`, loss_pos and loss_neg. For the caller, who must read them before it saves anything:
        finite (0 if the loss or its gradient is not finite; then no weight was updated, and the run should end) and
        stop (above 0 if any process asked for it).
    """
    if not optimizer.defaults.get("fused"):
        raise ValueError("train_step needs an optimizer with fused=True, which skips a step that is not finite")
    world = world_size()
    # For a network with random layers, such as dropout: their numbers depend on the step, not on those before it.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank() + 1]).generate_state(1, np.uint64)[0]))
    anchors = [make_anchors(config.anchors, *batch.images.shape[2:], batch.images.device) for batch in batches]
    assignments = [
        assign(level_anchors, batch.targets, batch.sizes, num_classes, config.assign)
        for level_anchors, batch in zip(anchors, batches, strict=True)
    ]
    positives = [count_positives(assignment, num_classes) for assignment in assignments]
    reduced = torch.stack([torch.cat(positives).sum(), torch.full_like(ema_positives, stop)])
    if world > 1:
        distributed.all_reduce(reduced)
    batch_positives, stop_requests = reduced  # of the global batch
    ema_positives.copy_(update_ema_positives(ema_positives, batch_positives, config.loss.ema_momentum))

    totals: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        normalizer_N = normalizer(
            positives[i], batch_positives, config.train.batch_size, ema_positives, config.loss.normalizer
        )
        normalizer_N = normalizer_N / world  # DDP averages gradients over the processes; this loss is a sum over them
        skip_sync = isinstance(model, DistributedDataParallel) and i + 1 < len(batches)
        with model.no_sync() if skip_sync else contextlib.nullcontext():  # type: ignore[operator]
            images = batch.normalized(config.train.compile).contiguous(memory_format=torch.channels_last)
            with autocast(images.device, config.train.precision):
                outputs = model(images)
            loss_arguments = (outputs, anchors[i], assignments[i], normalizer_N, config.loss)
            losses = detection_loss(*loss_arguments, config.detect.max_ratio)
            if log_loss_parts:
                losses["loss_pos"] = positive_class_loss(*loss_arguments)
            torch.autograd.backward(losses["loss"])
        totals = {name: totals.get(name, 0) + loss.detach() / world for name, loss in losses.items()}
    if world > 1:
        for loss in totals.values():
            distributed.all_reduce(loss)  # all processes have the same loss now and end together if it is not finite
    if log_loss_parts:
        totals["loss_neg"] = totals["loss_cls"] - totals["loss_pos"]
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    totals["grad_norm"] = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(totals["loss"] + totals["grad_norm"])

    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config.train)
    if config.train.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, config.train.clip_norm, totals["grad_norm"])
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # a fused one skips the update where it is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    totals["positives"] = batch_positives / config.train.batch_size
    return totals | {"finite": finite.float(), "stop": stop_requests}
