"""The figures of the report of a study. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from retina.plots.document import Picture, figure_picture
from retina.plots.result_files import read_metrics
from retina.plots.style import MANY_CLASSES, PALETTE, plain, style_axes, style_log_y, style_step_axis
from retina.study.cells import format_value, short_key
from retina.study.results import Group, as_number, best_of, distinct_values, mean, sd, with_ap

LINE_COLORS = [PALETTE[index] for index in (4, 5, 2, 0, 1, 6, 7)]  # without yellow, which is hard to see on white
MARKERS = "osD^vPX"


def plot_heat_map(groups: list[Group]) -> Picture | None:
    """AP over two keys that were combined, as colors and numbers; None for other studies."""
    keys = list(groups[0].settings)
    sizes = [len(distinct_values(groups, key)) for key in keys]
    if len(keys) != 2 or min(sizes) < 2 or 2 * len(groups) < math.prod(sizes):
        return None
    columns, rows = (list(map(json.dumps, distinct_values(groups, key))) for key in keys)
    means = [group.mean() for group in with_ap(groups)]
    # On a scale from zero, all but the worst cells would have nearly the same color.
    lowest = max(min(means), max(means) / 2)
    norm = Normalize(lowest, max(means))
    figure = Figure(figsize=(max(6.4, 1.02 * sizes[0] + 2.4), 0.74 * sizes[1] + 1.5), layout="constrained")
    axes, colors, best = figure.add_subplot(), colormaps["viridis"], best_of(groups)
    axes.add_patch(Rectangle((-0.5, -0.5), *sizes, facecolor="#f2f2f2", edgecolor="#d0d0d0", hatch="///", linewidth=0))
    for group in groups:
        x, y = (axis.index(json.dumps(group.settings[key])) for axis, key in zip((columns, rows), keys, strict=True))
        if not group.values():
            states = [state for state in ("diverged", "failed", "waiting") if group.count(state)]
            axes.text(x, y, states[0] if states else "", ha="center", va="center", fontsize=8.5, color="#444444",
                      bbox={"facecolor": "#f2f2f2", "edgecolor": "none", "pad": 1.5})  # fmt: skip
            continue
        color = colors(norm(group.mean()))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1))
        text_color = "black" if np.dot(color[:3], (0.299, 0.587, 0.114)) > 0.46 else "white"  # the better contrast
        has_sd = len(group.values()) > 1
        weight = "bold" if group is best else "normal"
        style: dict[str, Any] = {"color": text_color, "ha": "center", "va": "center"}
        axes.text(x, y + 0.08 * has_sd, f"{group.mean():.1f}", fontsize=12, weight=weight, **style)
        if has_sd:
            axes.text(x, y - 0.24, f"± {group.sd():.1f}", fontsize=8.5, **style)
        if group is best:
            axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor=text_color, linewidth=2))
    names = [short_key(key) for key in keys]
    axes.set(xlim=(-0.5, sizes[0] - 0.5), ylim=(-0.5, sizes[1] - 0.5), xlabel=names[0], ylabel=names[1])
    axes.set_xticks(range(sizes[0]), [format_value(json.loads(value)) for value in columns])
    axes.set_yticks(range(sizes[1]), [format_value(json.loads(value)) for value in rows])
    style_axes(axes, f"{_over_seeds('AP', groups)}; framed: the best", "")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    figure.colorbar(
        ScalarMappable(norm, colors), ax=axes, label="AP", extend="min" if lowest > min(means) else "neither"
    )
    return figure_picture(figure, "heat_map.png", f"AP over {names[0]} and {names[1]}, as colors")


def plot_ap_curves(groups: list[Group]) -> Iterator[Picture]:
    """AP over each key with numbers, one line for each combination of the other keys, and the paper's curves."""
    keys = list(groups[0].settings)
    names, telling = {key: short_key(key) for key in keys}, telling_keys(groups)
    for key in keys:
        values = distinct_values(groups, key)
        if len(values) < 3 or any(as_number(value) is None for value in values):
            continue
        single_line = len(values) == len(groups)  # the other keys change together with this one
        lines: dict[str, dict[int, Group]] = {}
        for group in groups:
            others = ", ".join(f"{names[k]} {format_value(group.settings[k])}" for k in telling if k != key)
            lines.setdefault("" if single_line else others, {})[values.index(group.settings[key])] = group
        if len(lines) > len(LINE_COLORS):
            continue
        ticks = [format_value(value) for value in values]
        if single_line and len(keys) > 1:
            (line,) = lines.values()
            ticks = ["\n".join(map(format_value, line[x].settings.values())) for x in range(len(values))]
        label = "\n".join(names.values()) if single_line else names[key]
        yield _plot_ap_curve(lines, ticks, label, f"AP_over_{names[key]}.png")
        if single_line:
            return


def telling_keys(groups: list[Group]) -> list[str]:
    """The keys that vary, without those that change together with one before them; they tell the groups apart."""
    telling: dict[str, list[str]] = {}
    for key in groups[0].settings:
        values = [json.dumps(group.settings[key]) for group in groups]
        known = any(len(set(zip(before, values, strict=True))) == len(set(before)) for before in telling.values())
        if len(set(values)) > 1 and not known:
            telling[key] = values
    return list(telling)


def _over_seeds(what: str, groups: list[Group]) -> str:
    runs = max((len(group.values()) for group in groups), default=0)
    return what + ("", ", one seed", ", mean and standard deviation over seeds")[min(runs, 2)]


def _plot_ap_curve(lines: dict[str, dict[int, Group]], ticks: list[str], label: str, file: str) -> Picture:
    has_paper = sum("AP" in group.paper for line in lines.values() for group in line.values()) > len(lines)
    figure = Figure(figsize=(11 if has_paper else 7.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if has_paper else 1, squeeze=False)[0]
    handles = []
    for index, line in enumerate(lines.values()):
        style: dict[str, Any] = {"color": LINE_COLORS[index], "marker": MARKERS[index], "markersize": 5}
        shift = 0.05 * (index - (len(lines) - 1) / 2)  # error bars side by side
        groups = [line.get(x) for x in range(len(ticks))]  # the line has a gap at None
        means, sds = ([math.nan if g is None else number(g) for g in groups] for number in (Group.mean, Group.sd))
        handles.append(_plot_error_bars(panels[0], [x + shift for x in range(len(ticks))], means, sds, style))
        paper = [math.nan if g is None else g.paper.get("AP", math.nan) for g in groups]
        if has_paper:
            style |= {"color": "#777777"} if len(lines) == 1 else {}
            panels[1].plot(paper, linestyle="--", **style)
    shown = [group for line in lines.values() for group in line.values()]
    titles = (_over_seeds("AP", shown), "the paper's AP, on COCO")
    for axes, title in zip(panels, titles, strict=False):
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlim=(-0.4, len(ticks) - 0.6), xlabel=label)
        style_axes(axes, title, "")
    if len(lines) > 1:
        figure.legend(handles, list(lines), loc="outside right upper", frameon=False)
    return figure_picture(figure, file, f"AP over {label.splitlines()[0]}")


def _plot_error_bars(
    axes: Axes, x: Sequence[float], means: Sequence[float], sds: Sequence[float], style: dict[str, Any]
) -> Any:
    """A line with error bars, none at a deviation of nan. Returns the line, for a legend."""
    bars = axes.errorbar(x, means, np.nan_to_num(sds), capsize=2.5, elinewidth=1, linewidth=1.4, **style)
    return bars.lines[0]


def plot_classes(chosen: list[Group], counts: dict[str, int]) -> Picture:
    """AP of each class, in the order of `counts`: the class with the most training objects first."""
    evaluated = {name: None for group in chosen for run in group.runs for name in run.metrics.get("per_class", {})}
    classes = [*(name for name in counts if name in evaluated), *(name for name in evaluated if name not in counts)]
    many = len(classes) > MANY_CLASSES
    figure = Figure(figsize=(14, 7) if many else (11, 4.8 + 0.2 * len(chosen)), layout="constrained")
    axes, handles = figure.add_subplot(), []
    for index, group in enumerate(chosen):
        values_by_class = [
            [100 * value for run in group.runs if (value := run.metrics.get("per_class", {}).get(name)) is not None]
            for name in classes
        ]
        shift = 0.08 * (index - (len(chosen) - 1) / 2)
        style = {"color": LINE_COLORS[index], "marker": MARKERS[index], "markersize": 3 if many else 5}
        x, means = [i + shift for i in range(len(classes))], [mean(values) for values in values_by_class]
        handles.append(_plot_error_bars(axes, x, means, [sd(values) for values in values_by_class], style))
    gap = " " if many else "\n"
    ticks = [f"{plain(name)}{gap}({counts[name]:,})" if name in counts else plain(name) for name in classes]
    crowded = many or max(map(len, ticks), default=0) > 16
    axes.set_xticks(range(len(classes)), ticks, rotation=90 if crowded else 0, fontsize=8 if many else 10)
    axes.set(xlim=(-0.6, len(classes) - 0.4), xlabel="class (training objects), from frequent to rare", ylabel="AP")
    style_axes(axes, _over_seeds("AP of each class", chosen), "no AP yet")
    labels = [f"{group.label}: {group.mean():.1f}" for group in chosen]
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3 if many else 1)
    return figure_picture(figure, "classes.png", "AP of each class, from frequent to rare")


def plot_losses(chosen: list[Group]) -> Picture | None:
    """The class loss of positive and of negative anchors over the steps; None without a logged loss.

    The curves are means over the seeds, smoothed over a fiftieth of the run.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    handles, labels = [], []
    for index, group in enumerate(chosen):
        curves = [
            curve for run in group.runs if run.metrics and len(curve := _read_losses(run.cell.folder / "metrics.csv"))
        ]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve[:, 0]) for curve in curves)))
        table = np.mean([curve[np.isin(curve[:, 0], steps)] for curve in curves], axis=0)
        window = max(1, len(table) // 50)
        smooth = [np.convolve(values, np.ones(window) / window, "valid") for values in table.T]
        for column, axes in enumerate(panels, start=1):
            (line,) = axes.plot(smooth[0], smooth[column], color=LINE_COLORS[index], linewidth=1.4)
        handles.append(line)
        labels.append(group.label)
    if not handles:
        return None
    panels[0].set_ylabel("class loss / number of positives")
    for axes, kind in zip(panels, ("positive", "negative"), strict=True):
        style_log_y(axes)
        style_step_axis(axes, max_ticks=6)
        style_axes(axes, f"{kind} anchors", "no loss yet")
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure_picture(figure, "losses.png", "Class loss of the positive and of the negative anchors over the steps")


def _read_losses(path: Path) -> NDArray[np.float64]:
    """(T, 3) float64: step, loss_pos, loss_neg; T is 0 for a file that is missing or lacks these columns."""
    try:
        return np.stack(list(read_metrics(path, ("step", "loss_pos", "loss_neg")).values()), axis=1)
    except (FileNotFoundError, ValueError):
        return np.empty((0, 3))
