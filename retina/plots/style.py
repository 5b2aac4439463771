"""Colors and axis styles that all plots share."""

import zlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

# Seven colors of Okabe and Ito, then seven more. Each of these is the color farthest from all before it in Oklab, for
# normal vision and simulated protanopia and deuteranopia. No pair is closer than the closest pair of the first seven.
OKABE_ITO = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
PALETTE = [*OKABE_ITO, "#882255", "#6600FF", "#77FFFF", "#8877FF", "#00DD99", "#775500", "#553399"]
COLOR_SALT = 12256031  # found by search: the classes of shapes, of BCCD, and COCO's ten most frequent differ in color
MANY_CLASSES = 20  # with more classes a panel takes the whole width


def class_color(name: str) -> str:
    """The color ("#RRGGBB") of a class, a function of its name: the same in every picture, run and data set."""
    return PALETTE[zlib.crc32(f"{COLOR_SALT}{name}".encode()) % len(PALETTE)]


def clean_text(text: str, longest: int = 32) -> str:
    """A name from the data on one line, without characters that cannot be drawn, shortened in the middle."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"


def plain(text: str) -> str:
    """A name from the data for a figure: shortened, and without mathematics between dollar signs."""
    return clean_text(text, 24).replace("$", r"\$")


def class_lines(names: Sequence[str]) -> list[dict[str, Any]]:
    """Color and line style of each class; classes with the same color differ in style."""
    styles = ("-", "--", ":", "-.")
    colors = [class_color(name) for name in names]
    return [{"color": color, "linestyle": styles[colors[:i].count(color) % 4]} for i, color in enumerate(colors)]


def style_axes(axes: Axes, title: str, empty: str) -> None:
    """Title, frame, grid and legend of a panel; `empty` is the text of a panel without data."""
    axes.set_title(title, loc="left", fontsize=11)
    style_grid(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    if not axes.has_data():
        axes.set(xticks=[], yticks=[])
        axes.minorticks_off()
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", color="#888888")


def style_grid(axes: Axes) -> None:
    """A pale grid behind the data, and a frame at the left and the bottom only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def style_log_y(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of each decade; values of 0 and below are not drawn."""
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def style_step_axis(axes: Axes, max_ticks: int) -> None:
    """An x axis of training steps, in thousands where they are many (90k)."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(max_ticks, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
