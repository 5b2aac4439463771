"""Trains one network with each of four losses on a problem, and scores it on the test examples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from retina.classify_demo.problems import Problem, split
from retina.losses import class_counts, class_weights, focal_nll_loss, softmax_focal_loss

LOSSES = ("CE", "weighted CE", "focal", "weighted focal")
GAMMA, STEPS, BATCH_SIZE, LEARNING_RATE = 2.0, 800, 128, 3e-3
NUM_BINS = 15  # of the calibration error
RAREST = "the rarest class"
Loss = Callable[[Tensor, Tensor], Tensor]
Values = NDArray[np.float64]
Scores = dict[str, dict[str, Values]]  # by loss and metric: (seeds,)


@dataclass(frozen=True)
class Result:
    """The scores of all losses on a problem, and what the calibration curves need: the test examples of all seeds."""

    problem: Problem
    scores: Scores
    probabilities: dict[str, Values]  # by loss: (seeds * test examples, classes)
    labels: NDArray[np.int64]  # (seeds * test examples,)


def build_losses(problem: Problem, weights: Tensor) -> dict[str, Loss]:
    """The four losses by name; `weights` (classes,) are those of the weighted ones."""
    cross_entropy = F.nll_loss if problem.log_probs else F.cross_entropy
    focal = focal_nll_loss if problem.log_probs else softmax_focal_loss
    losses = (
        cross_entropy,
        partial(cross_entropy, weight=weights),
        partial(focal, gamma=GAMMA),
        partial(focal, gamma=GAMMA, class_weight=weights),
    )
    return dict(zip(LOSSES, losses, strict=True))


def train(problem: Problem, indices: Tensor, loss: Loss, seed: int, steps: int = STEPS) -> nn.Module:
    """Train a new network on the examples of `indices`, each epoch in a new order.

    The initial weights and the batches depend on the seed alone, so all losses get the same ones.
    """
    torch.manual_seed(seed)
    model = problem.build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    rng, order = np.random.default_rng(seed), np.empty(0, dtype=int)
    for _ in range(steps):
        if len(order) < BATCH_SIZE:
            order = np.concatenate([order, rng.permutation(len(indices))])
        batch, order = indices[torch.from_numpy(order[:BATCH_SIZE])], order[BATCH_SIZE:]
        optimizer.zero_grad()
        loss(model(problem.inputs[batch]), problem.labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def run_experiment(problem: Problem, seeds: int, steps: int = STEPS) -> Result:
    """Train and score all losses for seeds 0, 1, ...; prints a line for each seed."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    probabilities: dict[str, list[Values]] = {name: [] for name in LOSSES}
    labels = []
    for seed in range(seeds):
        start = time.perf_counter()
        train_indices, test_indices = split(problem, seed)
        y = problem.labels[test_indices].numpy()
        labels.append(y)
        weights = class_weights(class_counts(problem.labels[train_indices], problem.num_classes))
        for name, loss in build_losses(problem, weights).items():
            model = train(problem, train_indices, loss, seed, steps)
            with torch.no_grad():
                p = (
                    model(problem.inputs[test_indices]).double().softmax(1).numpy()
                )  # exp where they are log-probabilities
            probabilities[name].append(p)
            runs[name].append(compute_metrics(p, y))
        print(f"{problem.title}: seed {seed + 1} of {seeds}, {time.perf_counter() - start:.1f} s", flush=True)
    scores = {
        name: {metric: np.array([run[metric] for run in of_loss]) for metric in of_loss[0]}
        for name, of_loss in runs.items()
    }
    pooled = {name: np.concatenate(parts) for name, parts in probabilities.items()}
    return Result(problem, scores, pooled, np.concatenate(labels))


def compute_metrics(probabilities: Values, labels: NDArray[np.int64]) -> dict[str, float]:
    """Precision and recall of each class, macro F1, expected calibration error (ECE), and confidence - accuracy.

    The prediction is the class with the highest probability. Precision is 0 for a class that is never predicted.

    Args:
        probabilities: (N, classes).
        labels: (N,) class ids.
    """
    classes = probabilities.shape[1]
    predictions = probabilities.argmax(1)
    confusion = np.bincount(classes * labels + predictions, minlength=classes**2).reshape(classes, classes)
    correct = confusion.diagonal()
    precision = correct / np.maximum(confusion.sum(0), 1)
    recall = correct / np.maximum(confusion.sum(1), 1)
    f1 = 2 * correct / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    metrics: dict[str, float] = {}
    for c, name in enumerate([*(f"class {c}" for c in range(classes - 1)), RAREST]):
        metrics |= {f"precision of {name}": float(precision[c]), f"recall of {name}": float(recall[c])}
    count, confidence, accuracy = calibration_bins(probabilities, labels)
    gap = confidence - accuracy
    return metrics | {
        "macro F1": float(f1.mean()),
        "ECE": float((count * abs(gap)).sum() / count.sum()),
        "confidence - accuracy": float((count * gap).sum() / count.sum()),
    }


def calibration_bins(probabilities: Values, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], Values, Values]:
    """Bins of equal width over the top probability: count, mean top probability and accuracy, each (NUM_BINS,).

    An empty bin has zeros.
    """
    top, correct = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.clip(np.ceil(top * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count = np.bincount(index, minlength=NUM_BINS)
    divisor = np.maximum(count, 1)
    return count, np.bincount(index, top, NUM_BINS) / divisor, np.bincount(index, correct, NUM_BINS) / divisor
