"""The learning rate as a function of the step, the optimizer, and the moving average of the weights."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from retina.config import Train


def learning_rate(step: int, config: Train) -> float:
    """The learning rate at `step`, counted from 0: linear warm-up, then a tenth at each milestone, or a half cosine.

    `config.lr` is for `reference_batch` images a step and scales linearly with the batch size (Goyal et al. 2017,
    arXiv 1706.02677).
    """
    peak = config.lr * config.batch_size / config.reference_batch
    if step < config.warmup_steps:
        return peak * (config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "steps":
        milestones_passed = sum(step >= round(fraction * config.steps) for fraction in config.milestones)
        return peak * 0.1**milestones_passed
    assert_never(config.schedule)


def build_optimizer(model: nn.Module, config: Train) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the trainable parameters; norm layers have the decay `norm_weight_decay`."""
    norm_layers = [m for m in model.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm, nn.LayerNorm))]
    norm_ids = {id(p) for layer in norm_layers for p in layer.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm_decay = config.weight_decay if config.norm_weight_decay is None else config.norm_weight_decay
    groups = [
        {"params": [p for p in trainable if id(p) not in norm_ids], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) in norm_ids], "weight_decay": norm_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    assert_never(config.optimizer)


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the weights and float buffers of `ema_model` towards those of `model`; integer buffers are copied.

    The decay is at most (1 + step) / (10 + step), so that the initial weights are soon forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    new, average = model.state_dict(), ema_model.state_dict()
    floating = [key for key in average if average[key].is_floating_point()]
    torch._foreach_lerp_([average[key] for key in floating], [new[key] for key in floating], 1 - decay)
    for key in average.keys() - set(floating):
        average[key].copy_(new[key])
