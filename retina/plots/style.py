"""Colours and the look that all plots share."""

import zlib

from matplotlib.axes import Axes

# Seven colours of Okabe and Ito, then seven more, each the one farthest from all before it in Oklab as seen with
# normal vision and in simulated protanopia and deuteranopia: no pair is closer than the closest of the first.
OKABE_ITO = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
PALETTE = [*OKABE_ITO, "#882255", "#6600FF", "#77FFFF", "#8877FF", "#00DD99", "#775500", "#553399"]
COLOR_SALT = 12256031  # found by trying: keeps apart the classes of shapes, of BCCD, and COCO's ten most frequent
MANY_CLASSES = 20  # more of them get a panel across the whole width


def class_color(name: str) -> str:
    """The colour ("#RRGGBB") of a class, a function of its name: the same in every picture, run and data set."""
    return PALETTE[zlib.crc32(f"{COLOR_SALT}{name}".encode()) % len(PALETTE)]


def style_axes(axes: Axes, title: str, empty: str) -> None:
    """The looks that all panels share; `empty` is written where nothing was drawn."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    if not axes.has_data():
        axes.set(xticks=[], yticks=[])
        axes.minorticks_off()
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", color="#888888")
