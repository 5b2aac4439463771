"""The paper's figure 4 for a trained detector: python tools/loss_distribution.py CHECKPOINT [--images 500].

The distribution of the class loss of a trained model over its positive and its negative anchors, computed with each of
four gammas. Writes loss_distribution.png (cumulative losses, normalized to 1) and loss_distribution.json (the numbers).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from retina.atomic_files import write_text
from retina.command_line import exit_with_error, file_path, with_path_errors
from retina.config_file import ConfigError
from retina.data.annotations import DataError
from retina.data.coco import CocoDataset
from retina.evaluate import LossDistribution, build_detector, find_weights, measure_loss_distribution, trained_config
from retina.model import CheckpointError, WeightsError
from retina.plots import PALETTE
from retina.plots.style import style_grid

COLORS = {0.0: PALETTE[4], 0.5: PALETTE[2], 1.0: PALETTE[0], 2.0: PALETTE[5]}  # by gamma, as in tools/plot_loss.py


def draw(distribution: LossDistribution, output: Path) -> Path:
    """Write the figure, 1600 pixels wide, to `output` and return that path."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    histograms = (distribution.positives, distribution.negatives)
    for axes, name, by_gamma in zip(figure.subplots(1, 2), ("positives", "negatives"), histograms, strict=True):
        for gamma, histogram in by_gamma.items():
            axes.plot(*histogram.curve(), color=COLORS[gamma], linewidth=2.5, label=f"$\\gamma$ = {gamma:g}")
        number = int(by_gamma[0.0].counts.sum())
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_title(f"{number:,} {name} of {distribution.images:,} images", loc="left", fontsize=18)
        axes.set_xlabel(f"fraction of the {name}, lowest loss first", fontsize=16)
        axes.set_ylabel("cumulative normalized loss", fontsize=16)
        axes.tick_params(labelsize=15)
        style_grid(axes)
        axes.legend(framealpha=1, edgecolor="none", fontsize=16, loc="upper left")
    figure.savefig(output, format="png", dpi=100)
    return output


def table(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal; fractions of the loss in percent."""
    lines = [
        f"{summary['images']} images, {summary['anchors_per_image']:,.0f} anchors per image, "
        f"{summary['positives_per_image']:.1f} of them positive; "
        f"{summary['negatives_per_positive']:,.0f} negatives for each positive",
        "",
        "          fraction of negatives' loss     of positives' loss      negatives' share",
        "gamma     hardest 1 %    hardest 10 %          hardest 20 %     of the class loss",
    ]
    for row in summary["gammas"]:
        gamma, *parts = row.values()
        one, ten, twenty, negatives = (f"{100 * part:.1f} %" for part in parts)
        lines.append(f"{gamma:5g}  {one:>14}  {ten:>14}  {twenty:>20}  {negatives:>20}")
    return "\n".join(lines)


@with_path_errors
def main() -> int:
    """Exit status: 0 with the results printed, 1 if checkpoint or data cannot be used, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=file_path, help="best.pt or last.pt of a run; its own config names the data")
    parser.add_argument("--output", type=file_path, help="folder to write to; default: that of the checkpoint")
    parser.add_argument("--images", type=int, default=500, help="largest number of images, evenly spaced (%(default)s)")
    arguments = parser.parse_args()
    file, output = arguments.checkpoint, arguments.output or arguments.checkpoint.parent
    if not file.is_file():
        exit_with_error(f"{file}: no such checkpoint; expected best.pt or last.pt of a run folder")
    if arguments.images < 1:
        exit_with_error(f"--images: given {arguments.images}, expected a number of at least 1")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exit_with_error(f"--output {output}: cannot be written to: {error.strerror}")
    try:
        weights = find_weights(file)
        config = trained_config(weights)
        dataset = CocoDataset(config.data.val_annotations, config.data.val_images, crowd=config.data.crowd)
        dataset = dataset.evenly_spaced(arguments.images)
        detector = build_detector(weights, config, dataset.categories)
        source, device = detector.source, detector.device
        print(f"{source}\n{len(dataset.records)} images of {dataset.folder} on {device}")
        distribution = measure_loss_distribution(
            detector.model,
            dataset,
            config,
            device,
            lambda batches: tqdm(batches, unit="batch", disable=not sys.stderr.isatty()),
        )
    except DataError as error:
        print(
            f"error: {error}\n{file}: its config names this data; relative paths start at the current folder",
            file=sys.stderr,
        )
        return 1
    except (CheckpointError, ConfigError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = distribution.summary()
    print(f"\n{table(summary)}\n")  # before anything is written, which may fail
    try:
        write_text(output / "loss_distribution.json", json.dumps({"checkpoint": source, **summary}, indent=1))
        print(draw(distribution, output / "loss_distribution.png"), output / "loss_distribution.json", sep="\n")
    except OSError as error:
        print(f"error: --output: {error.filename or output}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
