"""The figure: the focal loss over p_t, calibration curves, and the recall of the rarest class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retina.classify_demo.experiment import LOSSES, RAREST, Result, calibration_bins
from retina.losses import softmax_focal_loss
from retina.plots.style import PALETTE, style_grid

COLORS = dict(zip(LOSSES, [PALETTE[i] for i in (4, 1, 5, 0)], strict=True))
MARKERS = dict(zip(LOSSES, "osD^", strict=True))
MIN_BIN_COUNT = 100  # the accuracy of a smaller bin is not drawn


def draw_figure(results: list[Result], output: Path) -> Path:
    """Write a PNG, 1600 pixels wide, and return its path. The calibration curves are those of the second problem."""
    figure = Figure(figsize=(16, 6), layout="constrained")
    loss_axes, calibration_axes, recall_axes = figure.subplots(1, 3)
    _draw_loss_curves(loss_axes)
    _draw_calibration(calibration_axes, results[1])
    _draw_recall(recall_axes, results)
    for axes in (loss_axes, calibration_axes, recall_axes):
        style_grid(axes)
        axes.tick_params(labelsize=13)
        axes.xaxis.label.set_size(14)
        axes.yaxis.label.set_size(14)
    loss_axes.legend(frameon=False, fontsize=13)
    figure.legend(
        *calibration_axes.get_legend_handles_labels(), loc="outside lower right", ncols=5, frameon=False, fontsize=14
    )
    figure.savefig(output, format="png", dpi=100)
    return output


def _draw_loss_curves(axes: Axes) -> None:
    x = torch.linspace(-4, 6, 300, dtype=torch.float64)
    logits, labels = torch.stack([x, torch.zeros_like(x)], dim=1), torch.zeros(len(x), dtype=torch.long)
    for gamma, color in {0: COLORS["CE"], 0.5: PALETTE[2], 1: PALETTE[7], 2: COLORS["focal"], 5: PALETTE[6]}.items():
        loss = softmax_focal_loss(logits, labels, gamma=gamma, reduction="none")
        label = rf"$\gamma$ = {gamma:g}" + (" (CE)" if gamma == 0 else "")
        axes.plot(x.sigmoid(), loss, color=color, linewidth=2, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 4), xlabel="$p_t$, probability of the true class", ylabel="loss")
    axes.set_title("Loss of an example", loc="left", fontsize=15)


def _draw_calibration(axes: Axes, result: Result) -> None:
    axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1.2, label="calibrated")
    for name, probabilities in result.probabilities.items():
        count, confidence, accuracy = calibration_bins(probabilities, result.labels)
        shown = count >= MIN_BIN_COUNT
        axes.plot(confidence[shown], accuracy[shown], MARKERS[name] + "-", color=COLORS[name], label=name)
    axes.set(xlim=(0.38, 1.01), ylim=(0.38, 1.01), xlabel="top probability, seeds pooled", ylabel="accuracy")
    axes.set_title(f"Reliability, {result.problem.title}", loc="left", fontsize=15)


def _draw_recall(axes: Axes, results: list[Result]) -> None:
    for index, (name, color) in enumerate(COLORS.items()):
        values = [result.scores[name][f"recall of {RAREST}"] for result in results]
        x = np.arange(len(results)) + 0.18 * (index - 1.5)
        deviations = [v.std(ddof=1) if len(v) > 1 else 0 for v in values]
        means = [v.mean() for v in values]
        axes.errorbar(x, means, deviations, fmt=MARKERS[name], color=color, markersize=9, capsize=5, label=name)
    axes.set_xticks(range(len(results)), [result.problem.title.replace(", ", "\n") for result in results])
    axes.set(ylim=(0, 1), xlim=(-0.5, len(results) - 0.5), ylabel="recall, mean ± std over seeds")
    axes.set_title("Recall of the rarest class", loc="left", fontsize=15)
