"""The pictures of the page: images with boxes, and charts of the classes and of the sizes of the objects."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

from retina.check.data_check import DataCheck, Objects
from retina.check.findings import Example
from retina.config import Config
from retina.data.annotations import Annotations, DataError
from retina.data.batch import Batch
from retina.data.coco import CocoDataset, read_image
from retina.data.loader import train_batches
from retina.data.normalization import denormalize
from retina.model.backbone import LEVELS
from retina.plots.boxes import draw_boxes
from retina.plots.document import Picture, figure_picture, photo
from retina.plots.style import MANY_CLASSES, PALETTE, clean_text, style_axes
from retina.plural import plural

SIDE = (400, 800)  # least and largest longest side of a drawn image, pixels
FAR = 1e6  # pixels; the largest coordinate that is drawn
MAX_NAMES = 20  # boxes in an image, above which their names would hide it
SHEET = 16  # images
MAX_LOOKED_AT = 64  # images, of which SHEET can be read
TILE = 520  # longest side of an image of the sheet, pixels
NAMED_BARS = 100  # classes with their names under a chart
SPLIT_COLORS = {"train": PALETTE[4], "val": PALETTE[5]}


class Sheet(NamedTuple):
    """Images as the network gets them."""

    pictures: list[Picture]
    unreadable: list[str]  # why an image is left out, one message for each


def draw_example(example: Example) -> Image.Image:
    """The image of an example with its boxes, SIDE[0] to SIDE[1] pixels long.

    Where boxes reach out of the image, a gray margin of up to half of its longest side shows them.

    Raises:
        DataError: the file is missing or cannot be decoded.
    """
    if example.image is None:
        raise DataError("no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about large images and damaged tags
        try:
            pixels = read_image(example.image, example.size)
        except DataError:
            pixels = read_image(example.image)  # of another size than the JSON says: shows how the boxes fit
    height, width = pixels.shape[:2]
    boxes = np.array(example.boxes, np.float64).reshape(-1, 4)
    boxes = np.nan_to_num(boxes, nan=0, posinf=FAR, neginf=-FAR).clip(-FAR, FAR)
    size, half = np.array([width, height]), max(width, height) / 2
    before = np.minimum(-boxes[:, :2].min(axis=0, initial=0), half)
    after = np.minimum((boxes[:, 2:] - size).max(axis=0, initial=0), half)
    canvas_size = before + size + after
    scale = float(np.clip(1, *(side / canvas_size.max() for side in SIDE)))
    canvas = Image.new("RGB", _pixels(canvas_size * scale), "#d8d8d8")
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    image = Image.fromarray(pixels).resize(_pixels(size * scale), method)
    canvas.paste(image, (round(before[0] * scale), round(before[1] * scale)))
    names = [clean_text(name) for name in example.names] or [""] * len(boxes)
    text_size = 0 if len(boxes) > MAX_NAMES or not example.names else max(11, max(canvas.size) // 30)
    return draw_boxes(canvas, (boxes + np.tile(before, 2)) * scale, names, text_size=text_size)


def _pixels(size: NDArray[np.float64]) -> tuple[int, int]:
    width, height = (max(1, round(side)) for side in size.tolist())
    return width, height


def training_sheet(dataset: CocoDataset, config: Config) -> Sheet:
    """The first SHEET images that the training gets: augmented, and padded to the size of their batch.

    An image that cannot be read is left out. Up to MAX_LOOKED_AT samples are looked at.
    """
    data = config.data.model_copy(update={"workers": 0, "cache": None, "unreadable": "skip"})
    train = config.train.model_copy(update={"accumulate": 1, "steps": MAX_LOOKED_AT})
    processes = max(1, config.train.batch_size // SHEET)  # of a large batch only the first part is read
    sheet = Sheet([], [])
    looked_at = 0
    names = dict(zip(dataset.file.image_ids.tolist(), dataset.file.file_names.tolist(), strict=True))
    for (batch,) in train_batches(dataset, config.model_copy(update={"data": data, "train": train}), 0, 0, processes):
        for i, image_id in enumerate(batch.image_ids):
            looked_at += 1
            if image_id in batch.unreadable:
                if batch.unreadable[image_id] not in sheet.unreadable:
                    sheet.unreadable.append(batch.unreadable[image_id])
            else:
                sheet.pictures.append(_tile(batch, i, names[image_id], dataset.names))
            if len(sheet.pictures) == SHEET or looked_at == MAX_LOOKED_AT:
                return sheet
    return sheet


def _tile(batch: Batch, index: int, name: str, class_names: Sequence[str]) -> Picture:
    """One image of a batch with its targets; the padding has the color that is 0 for the network."""
    one = batch._replace(images=batch.images[index : index + 1], sizes=batch.sizes[index : index + 1])
    pixels = denormalize(one.normalized()[0], batch.normalization).permute(1, 2, 0)
    image = Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).numpy())
    scale = TILE / max(image.size)
    image = image.resize(_pixels(np.array(image.size) * scale), Image.Resampling.BICUBIC)
    target, (height, width) = batch.targets[index], batch.sizes[index]
    labels = [clean_text(class_names[label], 16) for label in target.labels.tolist()]
    boxes = torch.cat([target.boxes, target.ignore]).numpy() * scale
    ignored = len(target.ignore)
    image = draw_boxes(
        image,
        boxes,
        labels + ["ignored"] * ignored,
        dashed=[False] * len(labels) + [True] * ignored,
        text_size=0 if len(boxes) > MAX_NAMES else 18,
    )
    objects = plural(len(labels), "object") + f", {ignored} ignored" * bool(ignored)
    return photo(image, f"{name} with its boxes", TILE, f"{name}: {objects}, {width} x {height}")


def plot_classes(check: DataCheck) -> Picture:
    """The number of objects of each class in each split, in one order: that of the first split, frequent to rare."""
    classes = list({pair: None for split in check.splits for pair in _categories(split.file)})
    index = {pair: i for i, pair in enumerate(classes)}
    counts = []
    for split in check.splits:
        of_label = np.array([index[pair] for pair in _categories(split.file)])
        counts.append(np.bincount(of_label[split.file.labels[~split.file.crowd]], minlength=len(classes)))
    order = np.argsort(-counts[0], kind="stable")
    names = [clean_text(classes[i][1], 24) for i in order]
    many, num_splits = len(names) > MANY_CLASSES, len(counts)
    size = (11, 2.6 * num_splits + 0.8) if many else (11 if num_splits == 2 else 6, 0.8 + 0.28 * max(len(names), 3))
    figure = Figure(figsize=size, layout="constrained")
    shape = (num_splits, 1) if many else (1, num_splits)
    panels = figure.subplots(*shape, sharex=many, sharey=not many, squeeze=False).ravel()
    used = np.concatenate(counts)[np.concatenate(counts) > 0]
    logarithmic = bool(len(used) and used.max() > 1000 * used.min())
    for axes, split, count in zip(panels, check.splits, counts, strict=True):
        _plot_bars(axes, names, count[order].tolist(), SPLIT_COLORS[split.name], many, logarithmic)
        title = f"{split.name}: {count.sum():,} objects" + ", logarithmic" * logarithmic
        style_axes(axes, title, "no objects")
        axes.grid(visible=False, axis="x" if many else "y")
    return figure_picture(figure, "classes.png", "Number of objects of each class")


def _categories(file: Annotations) -> list[tuple[int, str]]:
    return list(zip(file.category_ids, file.names, strict=True))


def _plot_bars(axes: Axes, names: list[str], counts: list[int], color: str, vertical: bool, logarithmic: bool) -> None:
    positions = range(len(names))
    scale, start = ("log", 0.7) if logarithmic else ("linear", 0.0)
    if vertical:
        axes.bar(positions, counts, 0.8, color=color)
        axes.set_xlim(-0.7, len(names) - 0.3)
        if len(names) <= NAMED_BARS:
            axes.set_xticks(positions, names, rotation=90, fontsize=8, parse_math=False)
        else:
            axes.set_xlabel("classes, from frequent to rare")
        axes.set_yscale(scale)
        axes.set_ylim(bottom=start)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        return
    bars = axes.barh(positions, [max(count, start) for count in counts], 0.7, color=color)
    axes.set_yticks(positions, names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale(scale)
    most = max(*counts, 1)
    axes.set_xlim(start, most**1.15 * 2 if logarithmic else most * 1.15)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=9, padding=3)


def plot_sizes(objects: Objects, config: Config) -> Picture:
    """Histograms of the objects of the resized images, by size and by shape, with the anchors marked."""
    figure = Figure(figsize=(11, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    anchors = config.anchors
    sides = np.sqrt(objects.sizes.prod(axis=1))
    steps = anchors.octave_base * 2 ** (np.arange(anchors.scales) / anchors.scales)
    marks = np.outer([2.0**level for level in LEVELS], steps).ravel()
    _plot_log_histogram(left, sides, marks)
    left.set_xlabel("square root of the area, pixels of the resized image")
    style_axes(left, "objects by size", "no objects")
    _plot_log_histogram(right, objects.sizes[:, 1] / objects.sizes[:, 0].clip(1e-6), np.array(anchors.ratios))
    right.set_xlabel("height / width")
    style_axes(right, "objects by shape", "no objects")
    return figure_picture(figure, "sizes.png", "Histograms of the sizes and of the shapes of the objects")


def _plot_log_histogram(axes: Axes, values: NDArray[np.float64], anchors: NDArray[np.float64]) -> None:
    """Bars over a logarithmic axis, four to an octave, and a mark at each anchor."""
    logs = np.log2(values.clip(2**-6, 2**14))
    low, high = math.floor(min(logs.min(), np.log2(anchors.min()))), math.ceil(max(logs.max(), np.log2(anchors.max())))
    edges = 2.0 ** np.linspace(low, high, (high - low) * 4 + 1)
    axes.hist(2**logs, edges.tolist(), color=PALETTE[4], edgecolor="white", linewidth=0.5, label="objects")
    axes.plot(anchors, np.zeros_like(anchors), "^", color=PALETTE[5], markersize=7, clip_on=False, label="anchors",
              linestyle="none", zorder=3)  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = 2.0 ** np.arange(low, high + 1)
    axes.set_xticks(ticks, [f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
