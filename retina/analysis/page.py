"""The report of an evaluation as one page with pictures, and its numbers as JSON and CSV. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from retina.analysis.errors import KINDS
from retina.analysis.gallery import TITLES, Example, ReadImage, choose_examples, draw_example
from retina.analysis.pictures import (
    plot_calibration,
    plot_class_ap,
    plot_confusion,
    plot_counts,
    plot_curves,
    plot_lost_ap,
    plot_recall,
    plot_scores,
)
from retina.analysis.report import Report
from retina.analysis.tables import TABLE_TEXTS, Row, make_tables, to_csv
from retina.analysis.text import GALLERY_TEXTS, KIND_TEXTS, METRIC_TEXTS, calibration_sentences, percent, span, summary
from retina.analysis.thresholds import Threshold
from retina.atomic_files import write_text
from retina.data.annotations import DataError
from retina.plots.document import (
    Block,
    Bullets,
    Code,
    Gallery,
    Heading,
    Link,
    Paragraph,
    Picture,
    Table,
    to_html,
)

PAGE, DATA, FOLDER, METRICS = "report.html", "report.json", "report", "metrics.json"
MAX_ROWS = 200  # classes in a table


def write_report(report: Report, output: Path, images: Path, read_image: ReadImage, source: str, command: str) -> Path:
    """Write report.html, report.json, and report/*.csv with the same tables.

    Args:
        report: the numbers.
        output: the folder to write to.
        images: the folder of the image files.
        read_image: reads the pixels of an image file.
        source: a sentence about the detector.
        command: of prediction, to which `--score` is added.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be written.
    """
    examples = choose_examples(report)
    tables = make_tables(report, examples)
    commands = []
    if report.threshold is not None:
        commands = [f"{command} --score {score}" for score in (f"{report.threshold.score:g}", output / METRICS)]
    data = {"summary": summary(report), "source": source, "commands": commands, **tables}
    blocks = [
        *_blocks(report, source, commands),
        *_galleries(report, examples, images, output, read_image),
        *_data(tables),
    ]
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_text(output / FOLDER / f"{name}.csv", to_csv(rows))
    write_text(output / DATA, json.dumps(data, indent=1, allow_nan=False))
    write_text(output / PAGE, to_html(blocks))
    return output / PAGE


def _blocks(report: Report, source: str, commands: list[str]) -> Iterator[Block]:
    yield Heading(1, "Report of the evaluation")
    excluded = len(report.annotations.image_ids) - len(report.matches.image_ids)
    yield Paragraph(source + f". {excluded} images could not be read and do not count." * bool(excluded))
    yield Bullets(summary(report))
    if commands:
        yield Code(commands[0])
    yield from _average_precision(report)
    yield from _lost(report)
    yield from _scores(report, commands)
    yield from _found(report)
    yield from _calibration(report)
    if report.milliseconds is not None:
        yield Heading(2, "Speed")
        yield Paragraph(
            f"{report.milliseconds:.1f} milliseconds for an image at batch 1, {1000 / report.milliseconds:.1f} images "
            "per second, from normalization to NMS. Reading and resizing of the files is not included."
        )


def _average_precision(report: Report) -> Iterator[Block]:
    yield Heading(2, "Average precision")
    yield Paragraph(
        "In percent, as COCO defines it. The 95 % intervals are of a bootstrap over the images: they say how much the "
        "numbers would change with other images of the same kind. They do not include another training."
    )
    bounds = report.metrics_interval.T
    rows = [
        [name, percent(value), span(bound), METRIC_TEXTS[name]]
        for (name, value), bound in zip(report.metrics.items(), bounds, strict=True)
    ]
    yield Table(["", "percent", "95 % interval", ""], rows)
    yield _with_source(plot_class_ap(report), "classes")
    yield _class_table(report)


def _class_table(report: Report) -> Table:
    matches = report.matches
    rows = []
    for label in np.argsort(-report.errors.objects, kind="stable")[:MAX_ROWS]:
        of_class = ~matches.object_ignored[0] & (matches.object_labels == label)
        counts = len(np.unique(matches.object_images[of_class])), int(of_class.sum())
        aps = report.ap_K[label], report.precision_RK[:, label].mean()
        rows.append([
            report.names[label], *map(str, counts), percent(aps[0]), span(report.ap_interval[:, label]), percent(aps[1])
        ])  # fmt: skip
    return Table(["class", "images", "objects", "AP", "95 % interval", "AP50"], rows)


def _lost(report: Report) -> Iterator[Block]:
    if not report.errors.objects.any():
        return
    yield Heading(2, "Where the AP is lost")
    yield Paragraph(
        "The six kinds of errors of TIDE (Bolya et al. 2020), at IoU 0.5. The points are the AP50 that would be gained "
        "if only this kind were corrected. They do not add up, because errors hide each other."
    )
    order = np.argsort(-report.lost.lost, kind="stable")
    rows = [
        [
            KINDS[kind],
            percent(report.lost.lost[kind]),
            str(report.errors.count_kind(kind).sum()),
            *KIND_TEXTS[KINDS[kind]],
        ]
        for kind in order
    ]
    yield Table(["kind", "AP50 lost", "errors", "what it is", "what helps"], rows)
    yield _with_source(plot_lost_ap(report), "lost_ap")


def _scores(report: Report, commands: list[str]) -> Iterator[Block]:
    yield Heading(2, "At which score to use it")
    yield Paragraph(
        "At IoU 0.5. Precision: the share of the detections that is right. Recall: the share of the objects that is "
        "found. F1 is their harmonic mean. The recommended threshold has the best F1; take a higher one if a wrong "
        "detection is worse than a missed object, and a lower one in the opposite case."
    )
    yield _with_source(plot_scores(report), "scores")
    thresholds = zip(["all classes", *report.names], [report.threshold, *report.class_thresholds], strict=True)
    rows = [_threshold_row(name, threshold) for name, threshold in list(thresholds)[: MAX_ROWS + 1]]
    head = ["class", "--score", "F1 within 0.01", "right", "wrong", "missed", "precision", "recall", "F1"]
    yield Table(head, rows, bold=0)
    if commands and len(report.names) > 1:
        yield Paragraph(
            "With the threshold of each class instead of one for all (uncertain for a class of few objects):"
        )
        yield Code(commands[1])
    yield _with_source(plot_curves(report), "precision_recall")
    yield Heading(2, "What is confused with what")
    yield Paragraph(
        "Rows: what an object is. Columns: what it was detected as, at IoU 0.5. Colors are shares of the row. The last "
        "column has the objects without a detection, the last row the detections without an object."
    )
    yield _with_source(plot_confusion(report), "confusion")


def _threshold_row(name: str, threshold: Threshold | None) -> list[str]:
    if threshold is None:
        return [name, *["-"] * 8]
    counts = threshold.right, threshold.wrong, threshold.missed
    shares = threshold.precision, threshold.recall, threshold.f1
    nearly = f"{threshold.low:.2f} to {threshold.high:.2f}"
    return [name, f"{threshold.score:g}", nearly, *map(str, counts), *(f"{share:.3f}" for share in shares)]


def _found(report: Report) -> Iterator[Block]:
    if not report.errors.objects.any():
        return
    yield Heading(2, "Which objects are found")
    yield Paragraph(
        "Recall with 95 % intervals, and the number of objects in brackets. Where it is much higher for any score, a "
        "lower threshold finds these objects; where it is not, the detector does not see them."
    )
    yield _with_source(plot_recall(report), "recall")
    yield _with_source(plot_counts(report), "images")


def _calibration(report: Report) -> Iterator[Block]:
    yield Heading(2, "Are the scores probabilities?")
    if report.calibration is None:
        yield Paragraph("Not measured: there are no detections, or their scores are not between 0 and 1.")
        return
    yield Paragraph(
        "If they were, 80 of 100 detections with a score of about 0.8 would be right at IoU 0.5. D-ECE is the mean "
        "difference between score and precision over 20 bins (Küppers et al. 2020). The focal loss is known to change "
        "it. It does not change the AP, which depends on the order of the scores alone."
    )
    yield Bullets(calibration_sentences(report.calibration))
    yield _with_source(plot_calibration(report.calibration.all, report.calibration.temperature), "calibration")


def _galleries(
    report: Report, examples: dict[str, list[Example]], images: Path, output: Path, read_image: ReadImage
) -> Iterator[Block]:
    yield Heading(2, "The worst errors")
    yield Paragraph(
        "The detections that are wrong with the highest scores, and the largest objects that no detection is about. "
        "Solid lines are detections, dashed ones are objects. A click enlarges a picture; the name links to the file."
    )
    for kind, title in TITLES.items():
        yield Heading(3, f"{title} ({GALLERY_TEXTS[kind]})")
        pictures: list[Picture] = []
        unreadable = []
        for example in examples[kind]:
            try:
                pictures.append(draw_example(report, example, images, output, read_image))
            except DataError as error:
                unreadable.append(str(error))
        if unreadable:
            yield Paragraph(f"Not drawn: {'; '.join(dict.fromkeys(unreadable))}.")
        yield Gallery(pictures) if pictures else Paragraph("There are none." if not unreadable else "")


def _data(tables: dict[str, list[Row]]) -> Iterator[Block]:
    yield Heading(2, "Data")
    yield Paragraph(f"{DATA} has all numbers of this page, and there is a CSV file for each of its tables:")
    rows = [[f"{FOLDER}/{name}.csv", TABLE_TEXTS[name], str(len(rows))] for name, rows in tables.items()]
    yield Table(["file", "what", "rows"], rows)


def _with_source(picture: Picture, name: str) -> Picture:
    """A picture with a link to its numbers."""
    file = f"{FOLDER}/{name}.csv"
    return replace(picture, link=Link(f"Data: {file}", file))
