"""Four losses on imbalanced classes: python tools/classify_demo.py [--output docs/results] [--seeds 5] [--steps 800].

Cross entropy (CE) and the focal loss, each with and without class weights, train the same small network from the same
weights on the same batches. Prints precision, recall, macro F1 and calibration with their noise over the seeds, then
what these numbers say, and writes classify_demo.png. Needs scikit-learn, on the CPU less than a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from retina.command_line import exit_with_error
from retina.losses import class_weights, focal_nll_loss, softmax_focal_loss
from retina.plots.style import PALETTE

GAMMA, STEPS, BATCH, RATE = 2.0, 800, 128, 3e-3
TRAIN, BINS, VOCABULARY = 4000, 15, 600
COLORS = dict(zip(["CE", "weighted CE", "focal", "weighted focal"], [PALETTE[i] for i in (4, 1, 5, 0)], strict=True))
MARKERS = dict(zip(COLORS, "osD^", strict=True))
RARE = "the rarest class"
BETTER = {f"recall of {RARE}": 1, f"precision of {RARE}": 1, "macro F1": 1, "ECE": -1}  # -1: less is better
LEVEL = "no difference beyond the noise"
Values = NDArray[np.float64]
Scores = dict[str, dict[str, Values]]  # loss, measure: a value for each seed


@dataclass(frozen=True)
class Problem:
    """`inputs` (N, features) floats or (N, tokens) ids with 0 for padding; `labels` (N,), the last class the rarest."""

    title: str
    inputs: Tensor
    labels: Tensor
    model: Callable[[], nn.Module]
    log_probs: bool = False  # the model ends in LogSoftmax

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Result:
    problem: Problem
    scores: Scores
    probabilities: dict[str, Values]  # of the test examples of all seeds, (seeds * test, classes)
    labels: NDArray[np.int64]


def make_problems() -> list[Problem]:
    """The same examples at every call; which of them are for training depends on the seed of a run."""
    return [
        _points("a: 2 classes, 80/20 %", [0.8, 0.2], test=4000, flip=0.01, separation=0.5),
        _points("b: 3 classes, 90/9/1 %", [0.9, 0.09, 0.01], test=12000, flip=0.003, separation=1.0),
        _texts("c: text, 85/10/4/1 %", [0.85, 0.10, 0.04, 0.01], test=12000),
    ]


def _points(title: str, shares: list[float], test: int, flip: float, separation: float) -> Problem:
    from sklearn.datasets import make_classification

    x, y = make_classification(
        n_samples=TRAIN + test, n_features=20, n_informative=8, n_redundant=4, n_classes=len(shares), weights=shares,
        n_clusters_per_class=2, flip_y=flip, class_sep=separation, random_state=0,
    )  # fmt: skip
    return Problem(
        title, torch.from_numpy(x).float(), torch.from_numpy(y).long(),
        lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(shares))),
    )  # fmt: skip


def _texts(title: str, shares: list[float], test: int) -> Problem:
    """Documents of 8 to 32 tokens; a class makes some tokens of a common Zipf distribution likelier, others rarer."""
    rng = np.random.default_rng(0)
    counts = np.round(np.array(shares) * (TRAIN + test)).astype(int)
    rows = []
    for count in counts:
        p = np.exp(0.8 * rng.standard_normal(VOCABULARY)) / np.arange(1, VOCABULARY + 1)
        tokens = rng.choice(np.arange(1, VOCABULARY + 1), size=(count, 32), p=p / p.sum())
        rows.append(np.where(np.arange(32) < rng.integers(8, 33, (count, 1)), tokens, 0))

    labels = torch.from_numpy(np.repeat(np.arange(len(shares)), counts))
    return Problem(
        title, torch.from_numpy(np.concatenate(rows)), labels,
        lambda: nn.Sequential(
            nn.EmbeddingBag(VOCABULARY + 1, 16, padding_idx=0), nn.Linear(16, len(shares)), nn.LogSoftmax(dim=1)
        ),
        log_probs=True,
    )  # fmt: skip


def split(problem: Problem, seed: int) -> tuple[Tensor, Tensor]:
    """Indices for training and for the test, every class in both with its share."""
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(problem.labels))
    train, test = train_test_split(everything, train_size=TRAIN, stratify=problem.labels.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)


def losses_for(problem: Problem, weights: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    plain = F.nll_loss if problem.log_probs else F.cross_entropy
    focal = focal_nll_loss if problem.log_probs else softmax_focal_loss
    return {
        "CE": plain,
        "weighted CE": partial(plain, weight=weights),
        "focal": partial(focal, gamma=GAMMA),
        "weighted focal": partial(focal, gamma=GAMMA, class_weight=weights),
    }


def train(
    problem: Problem, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor], seed: int, steps: int = STEPS
) -> nn.Module:
    """Initial weights and batches depend on the seed alone; each pass over `rows` is in a new order."""
    torch.manual_seed(seed)
    model = problem.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    rng, order = np.random.default_rng(seed), np.empty(0, dtype=int)
    for _ in range(steps):
        if len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(rows))])
        batch, order = rows[torch.from_numpy(order[:BATCH])], order[BATCH:]
        optimizer.zero_grad()
        loss(model(problem.inputs[batch]), problem.labels[batch]).backward()
        optimizer.step()
    return model


def run(problem: Problem, seeds: int, steps: int = STEPS) -> Result:
    """All losses for seeds 0, 1, ...; prints a line for each seed."""
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in COLORS}
    probabilities: dict[str, list[Values]] = {name: [] for name in COLORS}
    labels = []
    for seed in range(seeds):
        start = time.perf_counter()
        rows, held_out = split(problem, seed)
        y = problem.labels[held_out].numpy()
        labels.append(y)
        weights = class_weights(problem.labels[rows], problem.classes)
        for name, loss in losses_for(problem, weights).items():
            model = train(problem, rows, loss, seed, steps)
            with torch.no_grad():
                p = model(problem.inputs[held_out]).double().softmax(1).numpy()  # of log-probabilities: exp
            probabilities[name].append(p)
            collected[name].append(measure(p, y))
        print(f"{problem.title}: seed {seed + 1} of {seeds}, {time.perf_counter() - start:.1f} s", flush=True)
    scores = {n: {key: np.array([one[key] for one in runs]) for key in runs[0]} for n, runs in collected.items()}
    pooled = {name: np.concatenate(parts) for name, parts in probabilities.items()}
    return Result(problem, scores, pooled, np.concatenate(labels))


def measure(probabilities: Values, labels: NDArray[np.int64]) -> dict[str, float]:
    """Of the class with the highest probability; precision is 0 for a class that is never predicted."""
    classes = probabilities.shape[1]
    guess = probabilities.argmax(1)
    confusion = np.bincount(classes * labels + guess, minlength=classes**2).reshape(classes, classes)
    hits = confusion.diagonal()
    precision = hits / np.maximum(confusion.sum(0), 1)
    recall = hits / np.maximum(confusion.sum(1), 1)
    f1 = 2 * hits / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    scores: dict[str, float] = {}
    for c, name in enumerate([*(f"class {c}" for c in range(classes - 1)), RARE]):
        scores |= {f"precision of {name}": float(precision[c]), f"recall of {name}": float(recall[c])}
    count, confidence, accuracy = calibration(probabilities, labels)
    gap = confidence - accuracy
    return scores | {
        "macro F1": float(f1.mean()),
        "ECE": float((count * abs(gap)).sum() / count.sum()),
        "confidence - accuracy": float((count * gap).sum() / count.sum()),
    }


def calibration(
    probabilities: Values, labels: NDArray[np.int64], bins: int = BINS
) -> tuple[NDArray[np.int64], Values, Values]:
    """Count, mean top probability and accuracy of `bins` bins of equal width over the top probability; 0 if empty."""
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.maximum(count, 1)
    return count, np.bincount(place, top, bins) / some, np.bincount(place, right, bins) / some


def difference(a: Values, b: Values) -> tuple[float, bool]:
    """Mean of a minus mean of b over the seeds, and whether it is larger than the pooled standard deviation."""
    gap = float(a.mean() - b.mean())
    if len(a) < 2 or len(b) < 2:
        return gap, False  # the noise is unknown
    return gap, abs(gap) > math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)


def show(values: Values) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def describe(problem: Problem) -> str:
    _, test = split(problem, 0)
    rare = problem.classes - 1
    of_test = int((problem.labels[test] == rare).sum())
    of_train = int((problem.labels == rare).sum()) - of_test
    return f"{problem.title}: {TRAIN} to train ({of_train} of {RARE}), {len(test)} to test ({of_test})"


def table(scores: Scores) -> str:
    """Mean ± standard deviation over the seeds, in Markdown."""
    rows = [["", *scores]]
    rows += [[name, *(show(values[name]) for values in scores.values())] for name in next(iter(scores.values()))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def best_sentence(what: str, values: dict[str, Values], sign: int = 1) -> str:
    """Which loss is best, and which others differ from it by no more than the noise. `sign` -1: less is better."""
    first, *others = sorted(values, key=lambda name: -sign * float(values[name].mean()))
    level = [name for name in others if not difference(values[first], values[name])[1]]
    if level == others:
        return f"{what}: {LEVEL} between the losses; {first} has {show(values[first])}."
    return f"{what}: {first} is best ({show(values[first])})" + (f"; {', '.join(level)}: {LEVEL}." if level else ".")


def pair_sentence(one: str, other: str, problems: dict[str, Scores]) -> str:
    """In which measures, on which problems, the first loss is better or worse than the other."""
    groups: dict[str, list[str]] = {"Better": [], "Worse": [], LEVEL.capitalize(): []}
    for what, sign in BETTER.items():
        found: dict[str, list[str]] = {}
        for title, scores in problems.items():
            a, b = scores[one][what], scores[other][what]
            gap, counts = difference(a, b)
            key = ("Better" if sign * gap > 0 else "Worse") if counts else LEVEL.capitalize()
            found.setdefault(key, []).append(f"{title[0]} {a.mean():.3f} against {b.mean():.3f}")
        for key, places in found.items():
            groups[key].append(f"{what} ({', '.join(places)})")
    return f"{one} against {other}. " + " ".join(f"{key}: {'; '.join(g) or 'nothing'}." for key, g in groups.items())


def conclusions(problems: dict[str, Scores]) -> list[str]:
    """Sentences that follow from the numbers alone."""
    first = next(iter(next(iter(problems.values())).values()))
    lines = ["A difference counts when it is larger than the pooled standard deviation of the seeds."]
    if len(first["ECE"]) < 2:
        lines = ["One seed shows no noise, so that no difference counts; take --seeds 2 or more."]
    for title, scores in problems.items():
        for what in (f"recall of {RARE}", "macro F1", "ECE"):
            values = {name: measures[what] for name, measures in scores.items()}
            lines.append(best_sentence(f"{title[0]}, {what}", values, BETTER[what]))
    pairs = [("focal", "CE"), ("weighted CE", "CE"), ("weighted focal", "weighted CE")]
    return lines + [pair_sentence(one, other, problems) for one, other in pairs]


def draw(results: list[Result], output: Path) -> Path:
    """Write a PNG, 1600 pixels wide: the loss over p_t, the calibration of problem b, recall of the rarest classes."""
    figure = Figure(figsize=(16, 6), layout="constrained")
    curves, reliability, recall = figure.subplots(1, 3)
    _draw_curves(curves)
    _draw_reliability(reliability, results[1])
    _draw_recall(recall, results)
    for axes in (curves, reliability, recall):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=13)
        axes.xaxis.label.set_size(14)
        axes.yaxis.label.set_size(14)
    curves.legend(frameon=False, fontsize=13)
    figure.legend(
        *reliability.get_legend_handles_labels(), loc="outside lower right", ncols=5, frameon=False, fontsize=14
    )
    figure.savefig(output, format="png", dpi=100)
    return output


def _draw_curves(axes: Axes) -> None:
    x = torch.linspace(-4, 6, 300, dtype=torch.float64)
    logits, truth = torch.stack([x, torch.zeros_like(x)], dim=1), torch.zeros(len(x), dtype=torch.long)
    for gamma, color in {0: COLORS["CE"], 0.5: PALETTE[2], 1: PALETTE[7], 2: COLORS["focal"], 5: PALETTE[6]}.items():
        loss = softmax_focal_loss(logits, truth, gamma=gamma, reduction="none")
        label = rf"$\gamma$ = {gamma:g}" + (" (CE)" if gamma == 0 else "")
        axes.plot(x.sigmoid(), loss, color=color, linewidth=2, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 4), xlabel="$p_t$, probability of the true class", ylabel="loss")
    axes.set_title("Loss of an example", loc="left", fontsize=15)


def _draw_reliability(axes: Axes, result: Result) -> None:
    axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1.2, label="calibrated")
    for name, p in result.probabilities.items():
        count, confidence, accuracy = calibration(p, result.labels)
        kept = count >= 100
        axes.plot(confidence[kept], accuracy[kept], MARKERS[name] + "-", color=COLORS[name], label=name)
    axes.set(xlim=(0.38, 1.01), ylim=(0.38, 1.01), xlabel="top probability, seeds pooled", ylabel="accuracy")
    axes.set_title(f"Reliability, {result.problem.title}", loc="left", fontsize=15)


def _draw_recall(axes: Axes, results: list[Result]) -> None:
    for index, (name, color) in enumerate(COLORS.items()):
        values = [result.scores[name][f"recall of {RARE}"] for result in results]
        x = np.arange(len(results)) + 0.18 * (index - 1.5)
        bars = [v.std(ddof=1) if len(v) > 1 else 0 for v in values]
        means = [v.mean() for v in values]
        axes.errorbar(x, means, bars, fmt=MARKERS[name], color=color, markersize=9, capsize=5, label=name)
    axes.set_xticks(range(len(results)), [result.problem.title.replace(", ", "\n") for result in results])
    axes.set(ylim=(0, 1), xlim=(-0.5, len(results) - 0.5), ylabel="recall, mean ± std over seeds")
    axes.set_title("Recall of the rarest class", loc="left", fontsize=15)


def main() -> int:
    """0 with the path of the picture printed, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the picture (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each loss on each problem (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a run (%(default)s)")
    arguments = parser.parse_args()
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            exit_with_error(f"--{name}: given {getattr(arguments, name)}, expected at least 1")
    if importlib.util.find_spec("sklearn") is None:
        exit_with_error("this demonstration needs scikit-learn: pip install scikit-learn")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output).close()
    except OSError as error:
        exit_with_error(f"--output {arguments.output}: not a folder to write to: {error.strerror}")

    results = [run(problem, arguments.seeds, arguments.steps) for problem in make_problems()]
    for result in results:
        print(f"\n{describe(result.problem)}\n\n{table(result.scores)}")
    print("\nWhat the numbers say\n")
    for line in conclusions({result.problem.title: result.scores for result in results}):
        print(textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  "))
    print(f"\n{draw(results, arguments.output / 'classify_demo.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
