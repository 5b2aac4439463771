"""The data sets of the demonstration: three imbalanced classification problems, each with its small network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

TRAIN_SIZE = 4000
VOCABULARY_SIZE = 600


@dataclass(frozen=True)
class Problem:
    """Examples with their labels, and a network for them.

    `inputs`: (N, features) floats, or (N, tokens) token ids with 0 for padding. `labels`: (N,) class ids; the last
    class is the rarest. `title` begins with the letter of the problem.
    """

    title: str
    inputs: Tensor
    labels: Tensor
    build_model: Callable[[], nn.Module]
    log_probs: bool = False  # the model ends in LogSoftmax

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def make_problems() -> list[Problem]:
    """The same examples at every call. `split` chooses those for training by the seed of a run."""
    return [
        _make_points("a: 2 classes, 80/20 %", [0.8, 0.2], test_size=4000, flip=0.01, separation=0.5),
        _make_points("b: 3 classes, 90/9/1 %", [0.9, 0.09, 0.01], test_size=12000, flip=0.003, separation=1.0),
        _make_texts("c: text, 85/10/4/1 %", [0.85, 0.10, 0.04, 0.01], test_size=12000),
    ]


def _make_points(title: str, fractions: list[float], test_size: int, flip: float, separation: float) -> Problem:
    from sklearn.datasets import make_classification

    x, y = make_classification(
        n_samples=TRAIN_SIZE + test_size, n_features=20, n_informative=8, n_redundant=4, n_classes=len(fractions),
        weights=fractions, n_clusters_per_class=2, flip_y=flip, class_sep=separation, random_state=0,
    )  # fmt: skip
    num_classes = len(fractions)
    return Problem(
        title, torch.from_numpy(x).float(), torch.from_numpy(y).long(),
        lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes)),
    )  # fmt: skip


def _make_texts(title: str, fractions: list[float], test_size: int) -> Problem:
    """Documents of 8 to 32 tokens. Each class has its own token frequencies: a common Zipf distribution, distorted."""
    rng = np.random.default_rng(0)
    counts = np.round(np.array(fractions) * (TRAIN_SIZE + test_size)).astype(int)
    token_ids = np.arange(1, VOCABULARY_SIZE + 1)
    documents = []
    for count in counts:
        p = np.exp(0.8 * rng.standard_normal(VOCABULARY_SIZE)) / token_ids
        tokens = rng.choice(token_ids, size=(count, 32), p=p / p.sum())
        documents.append(np.where(np.arange(32) < rng.integers(8, 33, (count, 1)), tokens, 0))

    labels = torch.from_numpy(np.repeat(np.arange(len(fractions)), counts))
    return Problem(
        title, torch.from_numpy(np.concatenate(documents)), labels,
        lambda: nn.Sequential(
            nn.EmbeddingBag(VOCABULARY_SIZE + 1, 16, padding_idx=0), nn.Linear(16, len(fractions)),
            nn.LogSoftmax(dim=1),
        ),
        log_probs=True,
    )  # fmt: skip


def split(problem: Problem, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test examples, stratified by class."""
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(problem.labels))
    train, test = train_test_split(indices, train_size=TRAIN_SIZE, stratify=problem.labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)
