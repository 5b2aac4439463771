"""A comparison as one page with pictures, and its numbers as JSON and CSV."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from retina.analysis.compared_runs import LETTERS, Comparison, image_rows, rows_of, run_rows
from retina.analysis.comparison_text import HEAD, describe_sides, limits, table_rows, verdict
from retina.analysis.gallery import corners
from retina.analysis.tables import MAX_ROWS, Row, to_csv
from retina.atomic_files import write_text
from retina.config import COCO_METRICS
from retina.data.annotations import DataError
from retina.plots.boxes import draw_boxes
from retina.plots.detections import ReadImage
from retina.plots.document import Block, Bullets, Heading, Paragraph, Picture, Table, figure_picture, photo, to_html
from retina.plots.fonts import load_font
from retina.plots.style import PALETTE, clean_text, plain, style_axes

PAGE, DATA, ROWS, IMAGES = "comparison.html", "comparison.json", "comparison.csv", "images.csv"
EXAMPLES = 8  # images that became better, and as many that became worse
TILE = 520  # longest side of an image in a pair, pixels
MAX_PLOTTED = 30  # classes in the figure
MAX_NAMES = 15  # errors in an image, above which their names would hide it
RIGHT, WRONG, MISSED = PALETTE[2], PALETTE[5], PALETTE[4]


def write_comparison(comparison: Comparison, output: Path, read_image: ReadImage) -> Path:
    """Write the page, its data as JSON, and the tables as CSV. Returns the path of the page."""
    rows, images = rows_of(comparison), image_rows(comparison)
    data = {
        "verdict": verdict(comparison),
        "limits": limits(comparison),
        "error": comparison.disagreement,
        "runs": run_rows(comparison),
        "seeds_degrees_of_freedom": comparison.noise.degrees_of_freedom if comparison.noise else None,
        "rows": rows,
        "images": images,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / DATA, json.dumps(data, indent=1, allow_nan=False))
    write_text(output / ROWS, to_csv(rows))
    write_text(output / IMAGES, to_csv(images))
    write_text(output / PAGE, to_html(list(_blocks(comparison, rows, read_image))))
    return output / PAGE


def _blocks(comparison: Comparison, rows: list[Row], read_image: ReadImage) -> Iterator[Block]:
    yield Heading(1, "Comparison of A and B")
    if comparison.disagreement:
        yield Paragraph(comparison.disagreement, "Error:")
    yield Bullets([*describe_sides(comparison), f"Images: {comparison.data.annotations.path}"])
    yield Paragraph(verdict(comparison), "What follows:")
    yield Paragraph("", "What does not:")
    yield Bullets(limits(comparison))
    yield Heading(2, "Differences")
    yield _plot_differences(rows)
    yield Table(HEAD, table_rows(rows[: len(COCO_METRICS) + MAX_ROWS]), bold=0)
    yield Heading(2, "Images that changed most")
    yield from _pairs(comparison, read_image)
    yield Heading(2, "Data")
    yield Paragraph(f"{DATA} has all numbers of this page; {ROWS} and {IMAGES} have the two tables.")


def _plot_differences(rows: list[Row]) -> Picture:
    """B - A of each number with its interval; the classes below the metrics."""
    classes = [row for row in rows if row["kind"] == "class"][:MAX_PLOTTED]
    shown = [row for row in rows if row["kind"] == "metric"] + classes
    figure = Figure(figsize=(8, 1 + 0.28 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#666666", linewidth=1)
    for position, row in enumerate(shown):
        known = row["low"] is not None
        reach = 100 * (row["high"] - row["value"]) if known else math.nan  # nothing is drawn
        real = known and (row["low"] > 0 or row["high"] < 0)
        axes.errorbar(100 * row["value"], position, xerr=reach, fmt="o", color=PALETTE[4], capsize=3,
                      markerfacecolor=PALETTE[4] if real else "white")  # fmt: skip
    axes.set_yticks(range(len(shown)), [plain(row["name"]) for row in shown])
    if classes:
        axes.axhline(len(shown) - len(classes) - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="B - A in percent; right of 0, B is better")
    style_axes(axes, "difference with its 95 % interval; filled: it leaves out 0", "no objects")
    return figure_picture(figure, "differences.png", "Difference of each number with its interval")


def _pairs(comparison: Comparison, read_image: ReadImage) -> Iterator[Block]:
    """The images with the largest change of errors in both directions, A beside B."""
    yield Paragraph(
        "Errors are missed objects and wrong detections, on average over the IoU thresholds 0.5 to 0.95, of the "
        "detections above the score with the best F1 of each side, or of all where none is right. Drawn at IoU 0.5: "
        "green, right; orange with a name, wrong; blue and dashed, missed. "
        + "With several trainings the first of each side is drawn."
        * (max(len(side.runs) for side in comparison.sides) > 1)
    )
    if comparison.data.images is None:
        yield Paragraph("There are no pictures, because the folder of the images is not known: give --images FOLDER.")
        return
    changes = comparison.changes()
    order = np.argsort(changes, kind="stable")
    for title, first, sign in (("Fewer errors with B", order, -1), ("More errors with B", order[::-1], 1)):
        yield Heading(3, title)
        chosen = [int(image) for image in first[:EXAMPLES] if sign * changes[image] > 0]
        if not chosen:
            yield Paragraph("None.")
        for image in chosen:
            try:
                yield _pair(comparison, image, read_image)
            except DataError as error:
                yield Paragraph(str(error))


def _pair(comparison: Comparison, image: int, read_image: ReadImage) -> Picture:
    """One image with the detections of A at the left and those of B at the right."""
    file, folder = comparison.data.annotations, comparison.data.images or Path()
    position = int(np.flatnonzero(file.image_ids == comparison.sides[0].matches[0].image_ids[image])[0])
    name = str(file.file_names[position])
    pixels = Image.fromarray(read_image(folder / name, (int(file.widths[position]), int(file.heights[position]))))
    left, right = (_tile(comparison, i, image, pixels) for i in (0, 1))
    sheet = Image.new("RGB", (left.width + right.width + 12, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 12, 0))
    before, after = (side.mean_errors()[image] for side in comparison.sides)
    text = f"{name}: {before:.1f} errors with A, {after:.1f} with B"
    return photo(sheet, f"{name} with the detections of A and of B", sheet.width, text)


def _tile(comparison: Comparison, side_number: int, image: int, pixels: Image.Image) -> Image.Image:
    """The image with the detections of one side, under a line that counts them."""
    letter, side = LETTERS[side_number], comparison.sides[side_number]
    matches, errors, run = side.matches[0], side.errors[0], side.runs[0]
    file = comparison.data.annotations
    kept = np.flatnonzero((matches.images == image) & (matches.scores >= errors.score) & ~matches.ignored[0, 0])
    right = kept[matches.found[0, 0, kept] >= 0]
    wrong = kept[matches.found[0, 0, kept] < 0]
    objects = matches.object_rows[(matches.object_images == image) & ~matches.object_ignored[0]]
    missed = np.setdiff1d(objects, matches.found[0, 0, right])
    names = [clean_text(text, 16) for text in matches.names]
    scale = TILE / max(pixels.size)
    canvas = pixels.resize((max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale))))
    origin = np.zeros(2, np.int64)
    boxes = run.results.boxes[matches.rows[right]]
    green = [RIGHT] * len(right)
    canvas = draw_boxes(
        canvas, corners(boxes, scale, origin), [""] * len(right), colors=green, text_size=0, line_width=1
    )
    texts = [names[label] for label in file.labels[missed]]
    texts += [f"{names[matches.labels[i]]} {matches.scores[i]:.2f}" for i in wrong]
    boxes = np.concatenate([file.boxes[missed], run.results.boxes[matches.rows[wrong]]])
    canvas = draw_boxes(
        canvas,
        corners(boxes, scale, origin),
        texts,
        colors=[MISSED] * len(missed) + [WRONG] * len(wrong),
        dashed=[True] * len(missed) + [False] * len(wrong),
        text_size=0 if len(texts) > MAX_NAMES else 13,
        line_width=3,
    )
    tile = Image.new("RGB", (canvas.width, canvas.height + 26), "white")
    tile.paste(canvas, (0, 26))
    header = f"{letter}: {len(right)} found, {len(missed)} missed, {len(wrong)} wrong (" + (
        f"score > {errors.score:g})" if np.isfinite(errors.score) else "all scores)"
    )
    ImageDraw.Draw(tile).text((2, 13), header, fill="#222222", font=load_font(15, header), anchor="lm")
    return tile
