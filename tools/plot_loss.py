"""The paper's figures 1 and 5 to 7, computed with retina.losses: python tools/plot_loss.py [--output docs/results].

Writes loss_curves.png: the focal loss against p_t; focal loss and FL* against x_t, and their derivatives by autograd;
FL* over a range of gamma and beta. In the paper's figure 7 the color shows the AP of a run with those settings;
configs/ablations/table3.yaml runs two of them. All losses are without alpha, as in the paper.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from retina.command_line import exit_with_error, file_path
from retina.losses import focal_star_loss, sigmoid_focal_loss
from retina.plots import PALETTE
from retina.plots.style import style_grid

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FIGURE_5 = {  # label: loss and color; the settings of table 3
    "cross entropy": (partial(sigmoid_focal_loss, gamma=0.0), PALETTE[4]),
    "FL, $\\gamma$ = 2": (partial(sigmoid_focal_loss, gamma=2.0), PALETTE[5]),
    "FL*, $\\gamma$ = 2, $\\beta$ = 1": (partial(focal_star_loss, gamma=2.0, beta=1.0), PALETTE[2]),
    "FL*, $\\gamma$ = 4, $\\beta$ = 0": (partial(focal_star_loss, gamma=4.0, beta=0.0), PALETTE[6]),
}


def curve(loss: Callable[..., Tensor], x_t: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a positive at the logits x_t (float64, any length), and its derivative."""
    x = x_t.clone().requires_grad_()
    values = loss(x, torch.ones_like(x), alpha=None, reduction="none")
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


def draw(output: Path) -> Path:
    """Write the figure, 1600 pixels wide, to `output` and return that path."""
    figure = Figure(figsize=(16, 13), layout="constrained")
    (against_p, against_x), (slopes, star) = figure.subplots(2, 2)
    p_t = torch.linspace(0.002, 0.9999, 500, dtype=torch.float64)
    colors = [PALETTE[i] for i in (4, 1, 7, 2, 0, 5, 6)]
    for gamma, color in zip(GAMMAS, colors, strict=True):
        values, _ = curve(partial(sigmoid_focal_loss, gamma=gamma), torch.logit(p_t))
        against_p.plot(p_t, values, color=color, linewidth=2, label=f"$\\gamma$ = {gamma:g}")
    x_t = torch.linspace(-4, 6, 500, dtype=torch.float64)
    for label, (loss, color) in FIGURE_5.items():
        values, slope = curve(loss, x_t)
        against_x.plot(x_t, values, color=color, linewidth=2, label=label)
        slopes.plot(x_t, slope, color=color, linewidth=2, label=label)
    against_p.axvspan(0.6, 1, color="#eeeeee", zorder=0)
    against_p.text(0.8, 3.1, "well classified", ha="center", fontsize=13)
    _finish(
        against_p,
        "Figure 1: the loss of an example",
        "$p_t$, probability of the true class",
        "loss",
        (0, 1),
        (0, 5),
        (0.13, 0.6),
    )
    _finish(against_x, "Figure 5: FL and FL*", "$x_t$, signed logit", "loss", (-4, 6), (0, 4.2), "upper right")
    _finish(
        slopes, "Figure 6: their slopes", "$x_t$, signed logit", "d loss / dx", (-4, 6), (-1.3, 0.05), "lower right"
    )
    for gamma, color in zip((1.0, 2.0, 4.0), (PALETTE[4], PALETTE[5], PALETTE[2]), strict=True):
        for beta, line in zip((0.0, 1.0, 2.0), ("-", "--", ":"), strict=True):
            values, _ = curve(partial(focal_star_loss, gamma=gamma, beta=beta), x_t)
            label = f"$\\gamma$ = {gamma:g}, $\\beta$ = {beta:g}"
            star.plot(x_t, values, color=color, linestyle=line, linewidth=2, label=label)
    _finish(star, "Figure 7: FL* over its settings", "$x_t$, signed logit", "loss", (-4, 6), (0, 4.2), "upper right")
    figure.savefig(output, format="png", dpi=100)
    return output


def _finish(
    axes: Axes,
    title: str,
    x: str,
    y: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    legend: str | tuple[float, float],
) -> None:
    axes.set(xlim=x_range, ylim=y_range)
    axes.set_title(title, loc="left", fontsize=15)
    axes.set_xlabel(x, fontsize=14)
    axes.set_ylabel(y, fontsize=14)
    axes.tick_params(labelsize=13)
    style_grid(axes)
    axes.legend(frameon=False, fontsize=13, loc=legend)


def main() -> int:
    """Exit status: 0 with the path printed, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=file_path, default=Path("docs/results"), help="folder of the picture (%(default)s)"
    )
    arguments = parser.parse_args()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        print(draw(arguments.output / "loss_curves.png"))
    except OSError as error:
        exit_with_error(f"--output {arguments.output}: cannot be written to: {error.strerror}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
