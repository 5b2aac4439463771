"""The curves of a run: losses, learning rate, AP, AP of each class, precision over recall."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from retina.config import COCO_METRICS
from retina.plots.fonts import use_fonts
from retina.plots.result_files import read_json, read_metrics
from retina.plots.style import (
    MANY_CLASSES,
    PALETTE,
    class_color,
    class_lines,
    plain,
    style_axes,
    style_log_y,
    style_step_axis,
)


def plot_run(run: Path, output: Path) -> Path:
    """Write a PNG of a run: losses, learning rate and AP over steps, and the last AP of each class.

    Args:
        run: a folder with metrics.csv (columns step, loss, loss_cls, loss_box, lr, and others) and, after the
            first evaluation, eval.json: a list of {step, AP, AP50, AP75, per_class: {name: AP}, and others},
            null where a number does not exist. Of a step that is there twice (a resumed run) the later counts.
        output: the file to write; its folder is created.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: there is no metrics.csv.
        ValueError: a file has another format than described above.
    """
    metrics = read_metrics(run / "metrics.csv")
    entries = read_json(run / "eval.json") if (run / "eval.json").is_file() else []
    by_step = {entry["step"]: entry for entry in entries}
    evaluations = [by_step[step] for step in sorted(by_step)]
    many_classes = bool(evaluations) and len(evaluations[-1]["per_class"]) > MANY_CLASSES

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(15, 8.5) if many_classes else (12, 7.5), layout=layout)
    grid = figure.add_gridspec(2, 3 if many_classes else 2)
    loss_axes, lr_axes = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _plot_losses(loss_axes, metrics)
    _plot_learning_rate(lr_axes, metrics)
    ap_axes = figure.add_subplot(grid[0, 2] if many_classes else grid[1, 0])
    _plot_ap(ap_axes, evaluations)
    _plot_class_ap(figure.add_subplot(grid[1, :] if many_classes else grid[1, 1]), evaluations)
    last_step = max([1, *metrics["step"], *by_step])
    for axes in (loss_axes, lr_axes, *([ap_axes] if len(evaluations) > 1 else [])):
        if axes.has_data():
            axes.set_xlim(0, last_step * 1.02)
            style_step_axis(axes, max_ticks=7)
    figure.suptitle(run.resolve().name, fontsize=14, fontweight="bold")
    output.parent.mkdir(parents=True, exist_ok=True)
    use_fonts(figure)
    figure.savefig(output, format="png", dpi=100)
    return output


def plot_precision_recall(curves: dict[str, list[float]]) -> Figure:
    """Precision over recall at IoU 0.5, one line for each class; for many classes in gray, with their mean.

    `curves`: by class name, the precision at evenly spaced recalls from 0 to 1.
    """
    figure = Figure(figsize=(7, 5.5))
    axes = figure.add_axes((0.09, 0.1, 0.88, 0.83))  # fixed: each evaluation draws it, and a layout takes as long again
    many = len(curves) > MANY_CLASSES
    for (name, values), style in zip(curves.items(), class_lines(list(curves)), strict=True):
        recalls = np.linspace(0, 1, len(values))
        if many:
            axes.plot(recalls, values, color="#bbbbbb", linewidth=0.7)
        else:
            axes.plot(recalls, values, label=plain(name), **style)
    if many:
        mean = np.mean(list(curves.values()), axis=0)
        axes.plot(recalls, mean, color="black", linewidth=2, label=f"mean of {len(curves)} classes")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    style_axes(axes, "precision and recall at IoU 0.5", "nothing to measure")
    use_fonts(figure)
    return figure


def _plot_losses(axes: Axes, metrics: dict[str, NDArray[np.float64]]) -> None:
    """Each loss in a pale color, and over it the running mean over a fiftieth of the logged steps; logarithmic."""
    window = max(1, len(metrics["step"]) // 50)
    kernel = np.ones(window) / window
    for name, color in (("loss", "#222222"), ("loss_cls", PALETTE[4]), ("loss_box", PALETTE[5])):
        finite = np.isfinite(metrics[name])
        steps, values = metrics["step"][finite], metrics[name][finite]
        if len(values) < window:
            continue
        mean = np.convolve(values, kernel, mode="valid")
        mean_steps = np.convolve(steps, kernel, mode="valid")
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
        axes.plot(mean_steps, mean, color=color, marker="o" if len(mean) == 1 else "", label=f"{name} {mean[-1]:.3f}")
    style_log_y(axes)
    style_axes(axes, f"training loss, mean of {window} steps" if window > 1 else "training loss", "no step yet")


def _plot_learning_rate(axes: Axes, metrics: dict[str, NDArray[np.float64]]) -> None:
    if len(metrics["lr"]):
        axes.plot(metrics["step"], metrics["lr"], color=PALETTE[2], marker="o" if len(metrics["lr"]) == 1 else "")
        axes.set_ylim(bottom=0)
    style_axes(axes, "learning rate", "no step yet")


def _plot_ap(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Lines over the steps; for a single evaluation bars, of small, medium and large objects too."""
    if len(evaluations) == 1:
        present = {name: evaluations[0][name] for name in COCO_METRICS[:6] if name in evaluations[0]}
        _draw_bars(axes, present, ["#222222", PALETTE[1], PALETTE[5], *[PALETTE[4]] * 3])
        style_axes(axes, f"average precision at step {evaluations[0]['step']}", "no AP yet")
        axes.grid(visible=False, axis="y")
        return
    steps = [entry["step"] for entry in evaluations]
    for name, color in (("AP50", PALETTE[1]), ("AP75", PALETTE[5]), ("AP", "#222222")):
        values = [math.nan if entry[name] is None else entry[name] for entry in evaluations]
        if not all(map(math.isnan, values)):
            axes.plot(steps, values, color=color, marker="o", markersize=4, label=f"{name} {values[-1]:.3f}")
    axes.set_ylim(0, 1)
    style_axes(axes, "average precision", "no AP yet")


def _plot_class_ap(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Bars by falling AP; classes without an AP (no ground truth) come last."""
    per_class: dict[str, float | None] = evaluations[-1]["per_class"] if evaluations else {}
    ranked = sorted(per_class.items(), key=lambda item: -1.0 if item[1] is None else item[1], reverse=True)
    names = [name for name, _ in ranked]
    if len(names) > MANY_CLASSES:
        positions, heights = range(len(names)), [value or 0.0 for _, value in ranked]
        texts = [_ap_text(value) for _, value in ranked]
        bars = axes.bar(positions, heights, color=PALETTE[4])
        axes.set_xticks(positions, list(map(plain, names)), rotation=90, fontsize=8)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.bar_label(bars, [text.removeprefix("0") for text in texts], fontsize=6.5, padding=1)
        axes.set_ylim(0, 1)
    elif names:
        _draw_bars(axes, dict(ranked), [class_color(name) for name in names])
    title = f"AP of each class at step {evaluations[-1]['step']}" if evaluations else "AP of each class"
    style_axes(axes, title, "no AP yet")
    axes.grid(visible=False, axis="x" if len(names) > MANY_CLASSES else "y")


def _draw_bars(axes: Axes, values: dict[str, float | None], colors: list[str]) -> None:
    """A horizontal bar for each name, the first at the top; None is drawn as "n/a"."""
    positions = range(len(values))
    bars = axes.barh(positions, [value or 0.0 for value in values.values()], 0.7, color=colors[: len(values)])
    axes.set_yticks(positions, list(map(plain, values)))
    margin = max(0.0, (5 - len(values)) / 2)  # a few bars do not fill the panel
    axes.set_ylim(len(values) - 0.5 + margin, -0.5 - margin)
    axes.bar_label(bars, list(map(_ap_text, values.values())), fontsize=9, padding=3)
    axes.set_xlim(0, 1)


def _ap_text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
