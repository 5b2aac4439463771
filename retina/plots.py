"""Pictures of a run and of detections. Reads result files only (CSV, JSON, images); never imports torch."""

import csv
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

# Seven colours of Okabe and Ito, then seven more, each the one farthest from all before it in Oklab as seen with
# normal vision and in simulated protanopia and deuteranopia: no pair is closer than the closest of the first.
OKABE_ITO = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
PALETTE = [*OKABE_ITO, "#882255", "#6600FF", "#77FFFF", "#8877FF", "#00DD99", "#775500", "#553399"]
SALT = 12256031  # found by trying: keeps apart the classes of shapes, of BCCD, and COCO's ten most frequent

TILE = 640  # longest side of an image in plot_detections, pixels
MANY_CLASSES = 20  # more of them get a panel across the whole width


def class_color(name: str) -> str:
    """The colour ("#RRGGBB") of a class, a function of its name: the same in every picture, run and data set."""
    return PALETTE[zlib.crc32(f"{SALT}{name}".encode()) % len(PALETTE)]


# ---- boxes on an image --------------------------------------------------------------------------------------


def draw_boxes(
    image: Image.Image,
    boxes_xyxy: ArrayLike,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    dashed: Sequence[bool] | None = None,
) -> Image.Image:
    """Draw boxes with their class names (and scores) on a copy of an image.

    Args:
        image: of any mode; drawn on in RGB.
        boxes_xyxy: (M, 4) corners in pixels of the image; what lies outside of it is cut off.
        labels: M class names; they choose the colours.
        scores: M numbers, written behind the names; the highest are drawn on top.
        dashed: M flags, True for a dashed outline (crowds).

    Returns:
        A new RGB image of the same size. Lines and letters grow with its longest side.

    Raises:
        ValueError: the lengths differ, or a box is not finite.
    """
    boxes = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)
    number = len(boxes)
    for name, given in (("labels", labels), ("scores", scores), ("dashed", dashed)):
        if given is not None and len(given) != number:
            raise ValueError(f"draw_boxes: {number} boxes, but {len(given)} {name}")
    if not np.isfinite(boxes).all():
        raise ValueError(f"draw_boxes: not finite: box {boxes[~np.isfinite(boxes).all(axis=1)][0].tolist()}")

    image = image.convert("RGB")  # a copy, whatever the mode
    if not number:
        return image
    draw = ImageDraw.Draw(image)
    # a box covers the pixels floor(x1) to ceil(x2) - 1
    pixels = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:]) - 1], axis=1)
    pixels = np.clip(pixels, 0, [image.width - 1, image.height - 1] * 2)
    corners = [(int(x1), int(y1), max(int(x1), int(x2)), max(int(y1), int(y2))) for x1, y1, x2, y2 in pixels]
    colors = [class_color(label) for label in labels]
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    # what is drawn last lies on top: the surest box, or else the smallest
    order = [int(index) for index in np.argsort(-areas if scores is None else np.asarray(scores), kind="stable")]
    line = max(1, round(max(image.size) / 250))
    for index in order:
        _outline(draw, corners[index], colors[index], line, dashed is not None and dashed[index])

    texts = list(labels) if scores is None else [f"{n} {s:.2f}" for n, s in zip(labels, scores, strict=True)]
    size = max(11, max(image.size) // 40)
    longest = max(_font(size).getlength(text) for text in texts)
    font = _font(min(size, max(4, int(size * image.width / (longest + size)))))
    pad = max(1, int(font.size) // 6)
    height = sum(font.getmetrics())
    places: dict[int, tuple[int, int, int, int]] = {}
    for index in reversed(order):  # the best places to those on top
        width = math.ceil(font.getlength(texts[index])) + 2 * pad
        places[index] = _place_tag(corners[index], width, height, image.size, list(places.values()))
    for index in order:
        x1, y1, x2, y2 = places[index]
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colors[index])
        draw.text((x1 + pad, y1), texts[index], fill=_contrast(colors[index]), font=font)
    return image


def _contrast(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"


def _outline(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: str, line: int, dashed: bool) -> None:
    """`line` pixels of the colour inside of the box, and round them an edge that shows it on any background."""
    x1, y1, x2, y2 = box
    edge = max(1, line // 4)

    def spans(start: int, end: int) -> list[tuple[int, int]]:
        """The whole side, or every other piece of it: an odd number of pieces, so that corners are drawn."""
        pieces = (end - start) // (6 * line) | 1 if dashed else 1
        cuts = [start + round((end - start + 1) * at / pieces) for at in range(pieces + 1)]
        return [(cuts[at], cuts[at + 1] - 1) for at in range(0, pieces, 2)]

    sides = []
    for left, right in spans(x1, x2):
        sides += [(left, y1, right, min(y1 + line - 1, y2)), (left, max(y1, y2 - line + 1), right, y2)]
    for top, bottom in spans(y1, y2):
        sides += [(x1, top, min(x1 + line - 1, x2), bottom), (max(x1, x2 - line + 1), top, x2, bottom)]
    for left, top, right, bottom in sides:
        draw.rectangle((left - edge, top - edge, right + edge, bottom + edge), fill=_contrast(color))
    for side in sides:
        draw.rectangle(side, fill=color)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows Latin, Greek and Cyrillic."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _place_tag(
    box: tuple[int, int, int, int],
    width: int,
    height: int,
    image_size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """A place inside of the image at an edge of the box, the first of those that cover least of `taken`."""
    x1, y1, x2, y2 = box[0], box[1], box[2] + 1, box[3] + 1
    tops = (y1 - height, y1, y2, y2 - height)  # above, inside, below, inside
    places = []
    for left, top in ((left, top) for top in tops for left in (x1, x2 - width)):
        x = max(0, min(left, image_size[0] - width))
        y = max(0, min(top, image_size[1] - height))
        places.append((x, y, x + width, y + height))

    def covered(place: tuple[int, int, int, int]) -> int:
        return sum(
            max(0, min(place[2], other[2]) - max(place[0], other[0]))
            * max(0, min(place[3], other[3]) - max(place[1], other[1]))
            for other in taken
        )

    return min(places, key=covered)


# ---- ground truth beside detections -------------------------------------------------------------------------


def plot_detections(
    annotations: Path, images: Path, detections: Path, output: Path, *, count: int = 8, score: float = 0.3
) -> Path:
    """Write a PNG of image pairs: ground truth left, detections right; crowd boxes are dashed.

    The choice is the same at every call: the set is cut into `count` stretches, and each gives its image with
    the most classes, and of these the one with the most objects (beyond six, more do not count).

    Args:
        annotations: COCO annotation JSON.
        images: the folder that its `file_name`s are in.
        detections: COCO results JSON: a list of {image_id, category_id, bbox (xywh, pixels), score}.
        output: the file to write; its folder is made.
        count: pairs to show, at most.
        score: detections below it are not shown.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: nothing to show, or detections of images or categories that the annotations lack.
    """
    coco, results = _read_json(annotations), _read_json(detections)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    truth_of: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    found_of: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    if not truth_of or count < 1:
        raise ValueError(f"nothing to show: {len(truth_of)} images in {annotations}, count = {count}")
    for annotation in coco["annotations"]:
        truth_of[annotation["image_id"]].append(annotation)
    for result in results:
        if result["image_id"] not in found_of or result["category_id"] not in names:
            raise ValueError(f"{detections}: {result} is of an image or a category that {annotations} lacks")
        if result["score"] >= score:
            found_of[result["image_id"]].append(result)

    def rank(image: dict[str, Any]) -> tuple[int, int]:
        truth = truth_of[image["id"]]
        return len({annotation["category_id"] for annotation in truth}), min(len(truth), 6)

    stretches = np.array_split(np.arange(len(coco["images"])), min(count, len(coco["images"])))
    tiles = []
    for stretch in stretches:
        image = max((coco["images"][index] for index in stretch), key=rank)
        truth, found = truth_of[image["id"]], found_of[image["id"]]
        path = images / image["file_name"]
        if not path.is_file():
            raise FileNotFoundError(f"no {path}, which {annotations} names: is {images} its image folder?")
        with Image.open(path) as opened:
            pixels = opened.convert("RGB")
        tiles.append(_tile(pixels, truth, names, f"{path.name}: {len(truth)} objects"))
        tiles.append(_tile(pixels, found, names, f"{len(found)} detections, score ≥ {score:g}"))
    output.parent.mkdir(parents=True, exist_ok=True)
    _sheet(tiles, columns=2 if len(stretches) <= 4 else 4).save(output, format="PNG")
    return output


def _tile(image: Image.Image, items: list[dict[str, Any]], names: dict[int, str], caption: str) -> Image.Image:
    """The image with the boxes of COCO annotations or results, TILE wide, under its caption."""
    scale = TILE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    boxes = np.array([item["bbox"] for item in items], dtype=float).reshape(-1, 4) * scale
    boxes[:, 2:] += boxes[:, :2]
    labels = [names[item["category_id"]] for item in items]
    scores = [item["score"] for item in items if "score" in item] or None
    image = draw_boxes(image, boxes, labels, scores, dashed=[bool(item.get("iscrowd")) for item in items])
    tile = Image.new("RGB", (TILE, image.height + 30), "white")
    tile.paste(image, ((TILE - image.width) // 2, 30))
    ImageDraw.Draw(tile).text((TILE // 2, 15), caption, fill="#333333", font=_font(18), anchor="mm")
    return tile


def _sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    """Tiles in rows; the two of a pair stand closer to each other than to their neighbours."""
    near, far = 8, 32
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    width = columns * TILE + columns // 2 * (near + far) + far
    sheet = Image.new("RGB", (width, sum(heights) + far // 2 * (len(rows) + 1)), "white")
    for at, row in enumerate(rows):
        y = sum(heights[:at]) + far // 2 * at + far // 4
        for column, tile in enumerate(row):
            sheet.paste(tile, (far + column * TILE + column // 2 * (near + far) + column % 2 * near, y))
    return sheet


# ---- the curves of a run ------------------------------------------------------------------------------------


def plot_run(run: Path, output: Path) -> Path:
    """Write a PNG of a run: losses, learning rate and AP over steps, and the last AP of each class.

    Args:
        run: a folder with metrics.csv (columns step, loss, loss_cls, loss_box, lr, and others) and, after the
            first evaluation, eval.json: a list of {step, AP, AP50, AP75, per_class: {name: AP}, and others},
            null where a number does not exist. Of a step that is there twice (a resumed run) the later counts.
        output: the file to write; its folder is made.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: there is no metrics.csv.
        ValueError: a file is not what is described above.
    """
    metrics = _read_metrics(run / "metrics.csv")
    entries = _read_json(run / "eval.json") if (run / "eval.json").is_file() else []
    by_step = {entry["step"]: entry for entry in entries}
    evaluations = [by_step[step] for step in sorted(by_step)]
    many = bool(evaluations) and len(evaluations[-1]["per_class"]) > MANY_CLASSES

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(15, 8.5) if many else (12, 7.5), layout=layout)
    grid = figure.add_gridspec(2, 3 if many else 2)
    losses, rate = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _plot_losses(losses, metrics)
    _plot_rate(rate, metrics)
    precision = figure.add_subplot(grid[0, 2] if many else grid[1, 0])
    _plot_precision(precision, evaluations)
    _plot_classes(figure.add_subplot(grid[1, :] if many else grid[1, 1]), evaluations)
    last = max([1, *metrics["step"], *by_step])
    for axes in (losses, rate, precision):
        if axes.has_data():
            axes.set_xlim(0, last * 1.02)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 90k
    figure.suptitle(run.resolve().name, fontsize=14, fontweight="bold")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png", dpi=100)
    return output


def precision_recall(curves: dict[str, list[float]]) -> Figure:
    """Precision over recall at IoU 0.5, a line a class; `curves`: precision at evenly spaced recalls from 0 to 1."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        label = name if len(curves) <= MANY_CLASSES else None
        axes.plot(np.linspace(0, 1, len(values)), values, color=class_color(name), label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    finish(axes, "precision and recall at IoU 0.5", "nothing to measure")
    return figure


def _plot_losses(axes: Axes, metrics: dict[str, NDArray[np.float64]]) -> None:
    """Each loss, pale, and its running mean over a fiftieth of the run; logarithmic, since losses fall by decades."""
    window = max(1, len(metrics["step"]) // 50)
    kernel = np.ones(window) / window
    for name, color in (("loss", "#222222"), ("loss_cls", PALETTE[4]), ("loss_box", PALETTE[5])):
        finite = np.isfinite(metrics[name])
        steps, values = metrics["step"][finite], metrics[name][finite]
        if len(values) < window:
            continue
        mean = np.convolve(values, kernel, mode="valid")
        middle = np.convolve(steps, kernel, mode="valid")
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
        axes.plot(middle, mean, color=color, marker="o" if len(mean) == 1 else "", label=f"{name} {mean[-1]:.3f}")
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    finish(axes, f"training loss, mean of {window} steps" if window > 1 else "training loss", "no step yet")


def _plot_rate(axes: Axes, metrics: dict[str, NDArray[np.float64]]) -> None:
    if len(metrics["lr"]):
        axes.plot(metrics["step"], metrics["lr"], color=PALETTE[2], marker="o" if len(metrics["lr"]) == 1 else "")
        axes.set_ylim(bottom=0)
    finish(axes, "learning rate", "no step yet")


def _plot_precision(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    steps = [entry["step"] for entry in evaluations]
    for name, color in (("AP50", PALETTE[1]), ("AP75", PALETTE[5]), ("AP", "#222222")):
        values = [math.nan if entry[name] is None else entry[name] for entry in evaluations]
        if not all(map(math.isnan, values)):
            axes.plot(steps, values, color=color, marker="o", markersize=4, label=f"{name} {values[-1]:.3f}")
    axes.set_ylim(0, 1)
    finish(axes, "average precision", "no AP yet")


def _plot_classes(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Bars, the best class first; classes without an AP (no ground truth) come last."""
    per_class: dict[str, float | None] = evaluations[-1]["per_class"] if evaluations else {}
    ranked = sorted(per_class.items(), key=lambda item: -1.0 if item[1] is None else item[1], reverse=True)
    names, heights = [name for name, _ in ranked], [value or 0.0 for _, value in ranked]
    texts = ["n/a" if value is None else f"{value:.2f}" for _, value in ranked]
    places = range(len(names))
    if len(names) > MANY_CLASSES:
        bars = axes.bar(places, heights, color=PALETTE[4])
        axes.set_xticks(places, names, rotation=90, fontsize=8)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.bar_label(bars, [text.removeprefix("0") for text in texts], fontsize=6.5, padding=1)
        axes.set_ylim(0, 1)
    elif names:
        bars = axes.barh(places, heights, 0.7, color=[class_color(name) for name in names])
        axes.set_yticks(places, names)
        spare = max(0.0, (5 - len(names)) / 2)  # few bars stay slim
        axes.set_ylim(len(names) - 0.5 + spare, -0.5 - spare)
        axes.bar_label(bars, texts, fontsize=9, padding=3)
        axes.set_xlim(0, 1)
    title = f"AP of each class at step {evaluations[-1]['step']}" if evaluations else "AP of each class"
    finish(axes, title, "no AP yet")
    axes.grid(visible=False, axis="x" if len(names) > MANY_CLASSES else "y")


def finish(axes: Axes, title: str, empty: str) -> None:
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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns that are drawn, by step. A last line cut short (the run is writing it) is left out."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: is {path.parent} the folder of a run?")
    columns = ["step", "loss", "loss_cls", "loss_box", "lr"]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {reader.fieldnames}")
        rows = list(reader)
    if rows and None in rows[-1].values():
        rows.pop()
    by_step: dict[float, list[float]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            values = [float(row[column]) for column in columns]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not numbers: {row}") from error
        by_step[values[0]] = values
    table = np.array([by_step[step] for step in sorted(by_step)]).reshape(-1, len(columns))
    return dict(zip(columns, table.T, strict=True))
