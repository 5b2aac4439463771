"""The figures of the report of an evaluation. Nothing is told by color alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retina.analysis.calibration import BINS, Reliability, Temperature
from retina.analysis.errors import KINDS
from retina.analysis.report import Report
from retina.analysis.tables import thinned
from retina.analysis.thresholds import ScoreCurve
from retina.plots.document import Picture, figure_picture
from retina.plots.run import plot_precision_recall
from retina.plots.style import MANY_CLASSES, PALETTE, class_lines, plain, style_axes

BLUE, ORANGE, GREEN = PALETTE[4], PALETTE[5], PALETTE[2]
NUMBERED = 20  # rows and columns of a heat map, up to which its cells have numbers
SHOWN_CLASSES = 15  # in the heat map of errors


def plot_class_ap(report: Report) -> Picture:
    """AP of all classes and of each, with 95 % intervals, from the best to the worst."""
    measured = np.flatnonzero(~np.isnan(report.ap_K))
    order = measured[np.argsort(-report.ap_K[measured], kind="stable")]
    ap = report.metrics["AP"]
    names = ["all classes", *(plain(report.names[label]) for label in order)]
    values = 100 * np.append(math.nan if ap is None else ap, report.ap_K[order])
    bounds = 100 * np.concatenate([report.metrics_interval[:, :1], report.ap_interval[:, order]], axis=1)
    lengths = np.abs(bounds - values)  # NaN: nothing is drawn
    many, positions = len(order) > MANY_CLASSES, np.arange(len(names))
    figure = Figure(figsize=(11, 4.5) if many else (8, 1.1 + 0.32 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    style: dict[str, Any] = {
        "fmt": "o",
        "color": BLUE,
        "ecolor": "#555555",
        "capsize": 3,
        "markersize": 4 if many else 6,
    }
    if many:
        axes.errorbar(positions, values, lengths, **style)
        axes.set_xticks(positions, names, rotation=90, fontsize=8)
        axes.set(ylabel="AP, percent", ylim=(0, 100), xlim=(-0.7, len(names) - 0.3))
    else:
        axes.errorbar(values, positions, xerr=lengths, **style)
        axes.set_yticks(positions, names)
        axes.set(xlabel="AP, percent", xlim=(0, 100), ylim=(len(names) - 0.4, -0.6))
    style_axes(axes, "AP with its 95 % interval", "no objects")
    return figure_picture(figure, "classes.png", "AP of each class with its interval")


def plot_lost_ap(report: Report) -> Picture:
    """The AP50 that each kind of error costs: the mean, and by class as a heat map."""
    lost, order = 100 * report.lost.lost, np.argsort(-report.lost.lost, kind="stable")
    by_class = 100 * report.lost.by_class.T
    measured = np.flatnonzero(~np.isnan(report.lost.ap))
    classes = measured[np.argsort(report.lost.ap[measured], kind="stable")][:SHOWN_CLASSES]
    figure = Figure(figsize=(11, max(3.2, 1.6 + 0.34 * len(classes))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    bars = left.barh(range(len(KINDS)), lost[order], 0.65, color=BLUE)
    left.set_yticks(range(len(KINDS)), [KINDS[kind] for kind in order])
    left.bar_label(bars, [f"{value:.1f}" for value in lost[order]], padding=3)
    left.set(ylim=(len(KINDS) - 0.4, -0.6), xlim=(0, max(1.0, 1.18 * lost.max())), xlabel="points of AP50")
    style_axes(left, "AP50 lost, mean of the classes", "no objects")
    left.grid(visible=False, axis="y")
    _heat_map(
        right,
        by_class[classes][:, order],
        [plain(report.names[label]) for label in classes],
        [KINDS[kind] for kind in order],
        "{:.1f}",
    )
    few = len(classes) < len(measured)
    right.set_title("AP50 lost by class" + f", the {len(classes)} with the lowest AP50" * few, loc="left", fontsize=11)
    return figure_picture(figure, "lost_ap.png", "AP50 that each kind of error costs, for all classes and by class")


def plot_curves(report: Report) -> Picture:
    """Precision over recall for each class."""
    curves = {
        name: report.precision_RK[:, label].tolist()
        for label, name in enumerate(report.names)
        if report.errors.objects[label]
    }
    return figure_picture(plot_precision_recall(curves), "precision_recall.png", "Precision over recall for each class")


def plot_scores(report: Report) -> Picture:
    """Precision, recall and F1 over the score for all classes together, and F1 for each class; the best are marked."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    curve, threshold = report.curve, report.threshold
    lines = (
        ("precision", curve.precision, ":", ORANGE),
        ("recall", curve.recall, "--", BLUE),
        ("F1", curve.f1, "-", "black"),
    )
    for name, values, line, color in lines:
        _plot_over_score(left, curve, values, color=color, linestyle=line, label=name)
    if threshold is not None:
        left.axvspan(threshold.low, threshold.high, color="#eeeeee", zorder=0)
        left.axvline(threshold.score, color="#666666", linewidth=1)
        left.annotate(f"{threshold.score:g}", (threshold.score, 0.02), xytext=(4, 0), textcoords="offset points")
    many = len(report.names) > MANY_CLASSES
    for name, one, best, style in zip(
        report.names, report.class_curves, report.class_thresholds, class_lines(report.names), strict=True
    ):
        if not one.num_objects:
            continue
        style = {"color": "#bbbbbb", "linewidth": 0.7} if many else {**style, "label": plain(name)}
        _plot_over_score(right, one, one.f1, **style)
        if best is not None:
            right.plot(best.score, best.f1, "o", color=style["color"], markersize=3 if many else 6)
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="lowest score that is kept")
    style_axes(left, "all classes together; gray: F1 within 0.01 of the best", "no detections")
    style_axes(right, "F1 of each class, its best marked", "no detections")
    return figure_picture(figure, "scores.png", "Precision, recall and F1 over the score")


def _plot_over_score(axes: Axes, curve: ScoreCurve, values: NDArray[np.float64], **style: Any) -> None:
    """Down to a score of 0. A threshold between two scores keeps what the higher one keeps: steps."""
    points = thinned(len(curve.scores))
    scores, values = curve.scores[points], values[points]
    axes.plot(
        np.append(scores, scores[-1:].clip(max=0)), np.append(values, values[-1:]), drawstyle="steps-post", **style
    )


def plot_confusion(report: Report) -> Picture:
    """The confusion matrix: colors are shares of the row, numbers are counts."""
    matrix = report.confusion
    names = [*(plain(name) for name in report.names), "background"]
    used = np.append(np.flatnonzero((matrix[:-1].sum(axis=1) + matrix[:, :-1].sum(axis=0)) > 0), len(matrix) - 1)
    counts, names = matrix[np.ix_(used, used)], [names[i] for i in used]
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(11.0, 3.6 + 0.55 * len(names)) if len(names) <= NUMBERED else 11.0
    figure = Figure(figsize=(side, 0.85 * side), layout="constrained")
    axes = figure.add_subplot()
    _heat_map(axes, shares, names, names, "{:d}", counts)
    axes.set(xlabel="detected as (background: not found)", ylabel="is (background: no object)")
    axes.set_title(f"detections with a score of at least {report.score:g}", loc="left", fontsize=11)
    return figure_picture(figure, "confusion.png", "Confusion matrix")


def _heat_map(
    axes: Axes,
    values: NDArray[np.float64],
    rows: list[str],
    columns: list[str],
    text: str,
    shown: NDArray[np.int64] | None = None,
) -> None:
    """Values from 0 up as a scale from white to blue, with numbers (`shown`, or the values) where there are few."""
    colors = colormaps["Blues"]
    norm = Normalize(0, max(1.0, float(np.nanmax(values, initial=0))))
    axes.imshow(np.nan_to_num(values).clip(0), cmap=colors, norm=norm, aspect="auto")
    small = max(len(rows), len(columns)) > NUMBERED
    crowded = small or max(map(len, columns), default=0) * len(columns) > 70
    axes.set_xticks(range(len(columns)), columns, rotation=90 if crowded else 0, fontsize=6 if small else 10)
    axes.set_yticks(range(len(rows)), rows, fontsize=6 if small else 10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if small:
        return
    numbers = values if shown is None else shown
    for (i, j), value in np.ndenumerate(values):
        dark = norm(np.nan_to_num(value)) > 0.55
        number = "-" if np.isnan(value) else text.format(numbers[i, j])
        if shown is not None and i == j == len(rows) - 1:
            continue  # background that was not detected is not counted
        axes.text(j, i, number, ha="center", va="center", color="white" if dark else "black", fontsize=9.5)


def plot_recall(report: Report) -> Picture:
    """Recall over the properties of the objects, with intervals."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(report.recall), sharey=True)
    for axes, part in zip(panels, report.recall, strict=True):
        positions = np.arange(len(part.names))
        recall = part.found / part.objects
        lengths = np.abs(part.interval() - recall)
        axes.plot(
            positions, part.found_at_all / part.objects, "D", color=ORANGE, markerfacecolor="none", label="any score"
        )
        axes.errorbar(positions, recall, lengths, fmt="o", color=BLUE, capsize=3,
                      label=f"score of at least {report.score:g}")  # fmt: skip
        ticks = [f"{name}\n({count})" for name, count in zip(part.names, part.objects, strict=True)]
        axes.set_xticks(positions, ticks, rotation=90 if len(ticks) > 4 else 0, fontsize=9)
        axes.set(xlim=(-0.6, len(ticks) - 0.4), ylim=(0, 1.03))
        name, _, unit = part.title.partition(" (")
        axes.set_xlabel(unit.rstrip(")"), fontsize=9)
        style_axes(axes, f"recall by {name}", "no objects")
        axes.get_legend().remove() if axes is not panels[0] and axes.get_legend() else None
    return figure_picture(figure, "recall.png", "Recall by size, shape and number of neighbors of the objects")


def plot_counts(report: Report) -> Picture:
    """The detections over the objects of each image."""
    pairs, counts = np.unique(np.stack([report.objects_B, report.detections_B]), axis=1, return_counts=True)
    most = max(1, int(pairs.max(initial=0)))
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, most], [0, most], color="#888888", linewidth=1, label="equal")
    sizes = np.maximum(4, counts * min(18, 250 / counts.max(initial=1)))
    axes.scatter(pairs[0], pairs[1], s=sizes, color=BLUE, alpha=0.6, linewidths=0)
    axes.plot([], [], "o", color=BLUE, alpha=0.6, markersize=5, label="an image; more images: larger")
    axes.set(xlabel="objects in the image", ylabel=f"detections with a score of at least {report.score:g}")
    style_axes(axes, "detections per image", "no images")
    return figure_picture(figure, "images.png", "Detections over objects for each image")


def plot_calibration(everything: Reliability, temperature: Temperature | str) -> Picture:
    """Reliability diagrams: of all detections, and of half of the images before and after the temperature."""
    parts = [("all detections", everything)]
    if isinstance(temperature, Temperature):
        parts += [
            ("second half of the images", temperature.before),
            (f"the same, T = {temperature.value:.2f}", temperature.after),
        ]
    figure = Figure(figsize=(3.7 * len(parts), 4.4), layout="constrained")
    panels = figure.subplots(2, len(parts), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    edges = np.arange(BINS) / BINS
    for (above, below), (title, part) in zip(panels.T, parts, strict=True):
        above.bar(edges, np.nan_to_num(part.precision), 1 / BINS, align="edge", color=PALETTE[1], edgecolor="white",
                  label="precision")  # fmt: skip
        above.plot([0, 1], [0, 1], "--", color="#666666", label="calibrated")
        above.plot(part.scores, part.precision, "o", color="black", markersize=3, label="mean score")
        below.bar(edges, part.counts, 1 / BINS, align="edge", color="#888888", edgecolor="white")
        below.set_yscale("symlog", linthresh=1)
        below.set(xlabel="score", xlim=(0, 1))
        above.set_ylim(0, 1.02)
        style_axes(above, f"{title}\nD-ECE {part.d_ece:.3f}", "no detections")
        style_axes(below, "", "no detections")
        if title != parts[0][0]:
            above.get_legend().remove()
    panels[0, 0].set_ylabel("share that is right")
    panels[1, 0].set_ylabel("detections")
    return figure_picture(figure, "calibration.png", "Reliability diagrams of the scores")
