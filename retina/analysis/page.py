"""The report of an evaluation as one page with pictures, and its numbers as JSON and CSV. Imports no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from retina.analysis.gallery import TITLES, Example, choose_examples, draw_example
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
from retina.analysis.tables import MAX_ROWS, TABLE_TEXTS, Row, make_tables, to_csv
from retina.analysis.text import (
    GALLERY_TEXTS,
    KIND_TEXTS,
    METRIC_TEXTS,
    calibration_sentences,
    other_ap50,
    percent,
    span,
    summary,
)
from retina.atomic_files import write_text
from retina.data.annotations import DataError
from retina.plots.detections import ReadImage
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
from retina.plural import plural

Tables = dict[str, list[Row]]  # by the keys of TABLE_TEXTS

PAGE, DATA, FOLDER, METRICS = "report.html", "report.json", "report", "metrics.json"


def write_report(
    report: Report,
    output: Path,
    images: Path,
    read_image: ReadImage,
    source: str,
    command: Sequence[str],
    no_command: str = "",
) -> Path:
    """Write report.html, report.json, and report/*.csv with the same tables.

    Args:
        report: the numbers.
        output: the folder to write to.
        images: the folder of the image files.
        read_image: reads the pixels of an image file.
        source: a sentence about the detector.
        command: the words of a prediction with this detector, to which `--score` is added; empty: there is none.
        no_command: a sentence that says why.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be written.
    """
    examples = choose_examples(report)
    tables = make_tables(report, examples)
    commands = []
    if command and report.threshold is not None:
        scores = repr(report.threshold.score), str(output / METRICS)
        commands = [shlex.join([*command, "--score", score]) for score in scores]
    data = {
        "summary": summary(report), "source": source, "error": report.disagreement, "commands": commands, **tables
    }  # fmt: skip
    blocks = [
        *_blocks(report, tables, source, commands, no_command),
        *_galleries(report, examples, images, output, read_image),
        *_data(tables),
    ]
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_text(output / FOLDER / f"{name}.csv", to_csv(rows))
    write_text(output / DATA, json.dumps(data, indent=1, allow_nan=False))
    write_text(output / PAGE, to_html(blocks))
    return output / PAGE


def _blocks(report: Report, tables: Tables, source: str, commands: list[str], no_command: str) -> Iterator[Block]:
    """The numbers of the text are those of the tables, so the page and its data cannot differ."""
    evaluation = tables["evaluation"][0]
    yield Heading(1, "Report of the evaluation")
    if report.disagreement:
        yield Paragraph(report.disagreement, "Error:")
    excluded = evaluation["excluded_images"]
    yield Paragraph(source + f". Not counted, because not readable: {plural(excluded, 'image')}." * bool(excluded))
    yield Bullets(summary(report))
    if commands:
        yield Code(commands[0])
    elif no_command:
        yield Paragraph(no_command)
    yield from _average_precision(report, tables)
    yield from _lost(report, tables)
    yield from _scores(report, tables, commands)
    yield from _found(report)
    yield from _calibration(report, tables)
    if evaluation["milliseconds"] is not None:
        yield Heading(2, "Speed")
        yield Paragraph(
            f"{evaluation['milliseconds']:.1f} milliseconds for an image at batch 1, "
            f"{evaluation['images_per_second']:.1f} images per second, from normalization to NMS. Reading and resizing "
            "of the files is not included."
        )


def _average_precision(report: Report, tables: Tables) -> Iterator[Block]:
    yield Heading(2, "Average precision")
    yield Paragraph(
        "In percent, as COCO defines it. The 95 % intervals are for the numbers on all images of this kind, from a "
        "bootstrap over these images. They do not include another training."
    )
    rows = [
        [row["metric"], percent(row["value"]), span(row["low"], row["high"]), METRIC_TEXTS[row["metric"]]]
        for row in tables["coco"]
    ]
    yield Table(["", "percent", "95 % interval", ""], rows)
    yield _with_source(plot_class_ap(report), "classes")
    rows = [
        [row["class"], str(row["images"]), str(row["objects"]), percent(row["AP"]), span(row["low"], row["high"]),
         percent(row["AP50"])]
        for row in sorted(tables["classes"], key=lambda row: -row["objects"])[:MAX_ROWS]
    ]  # fmt: skip
    yield Table(["class", "images", "objects", "AP", "95 % interval", "AP50"], rows)


def _lost(report: Report, tables: Tables) -> Iterator[Block]:
    if not report.errors.objects.any():
        return
    yield Heading(2, "Where the AP is lost")
    yield Paragraph(
        "The six kinds of errors of TIDE (Bolya et al. 2020), at IoU 0.5. The points are the AP50 that would be gained "
        "if only this kind were corrected. They do not add up, because errors hide each other."
    )
    by_kind = tables["lost_ap"][:: len(report.names) + 1]  # of all classes together
    rows = [
        [row["kind"], percent(row["lost_AP50"]), str(row["errors"]), *KIND_TEXTS[row["kind"]]]
        for row in sorted(by_kind, key=lambda row: -row["lost_AP50"])
    ]
    yield Table(["kind", "AP50 lost", "errors", "what it is", "what helps"], rows)
    yield from (Paragraph(text) for text in other_ap50(report))
    yield _with_source(plot_lost_ap(report), "lost_ap")


def _scores(report: Report, tables: Tables, commands: list[str]) -> Iterator[Block]:
    yield Heading(2, "At which score to use it")
    yield Paragraph(
        "At IoU 0.5. Precision: the share of the detections that is right. Recall: the share of the objects that is "
        "found. F1 is their harmonic mean. The recommended threshold has the best F1; take a higher one if a wrong "
        "detection is worse than a missed object, and a lower one in the opposite case."
    )
    yield _with_source(plot_scores(report), "scores")
    rows = [_threshold_cells(row) for row in tables["thresholds"][: MAX_ROWS + 1]]
    rows[0][0] = "all classes"
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


def _threshold_cells(row: Row) -> list[str]:
    if row["score"] is None:
        return [row["class"], *["-"] * 8]
    counts = [str(row[name]) for name in ("right", "wrong", "missed")]
    shares = [f"{row[name]:.3f}" for name in ("precision", "recall", "f1")]
    return [row["class"], repr(row["score"]), f"{row['low']:.2f} to {row['high']:.2f}", *counts, *shares]


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


def _calibration(report: Report, tables: Tables) -> Iterator[Block]:
    yield Heading(2, "Are the scores probabilities?")
    if report.calibration is None:
        yield Paragraph("Not measured: there are no detections that count, or their scores are not between 0 and 1.")
        return
    yield Paragraph(
        "If they were, 80 of 100 detections with a score of about 0.8 would be right at IoU 0.5. D-ECE is the mean "
        "difference between score and precision over 20 bins (Küppers et al. 2020). The focal loss is known to change "
        "it. It does not change the AP, which depends on the order of the scores alone."
    )
    yield Bullets(
        calibration_sentences(tables["calibration_summary"], report.threshold, report.calibration.temperature)
    )
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


def _data(tables: Tables) -> Iterator[Block]:
    yield Heading(2, "Data")
    yield Paragraph(f"{DATA} has all numbers of this page, and there is a CSV file for each of its tables:")
    rows = [[f"{FOLDER}/{name}.csv", TABLE_TEXTS[name], str(len(rows))] for name, rows in tables.items()]
    yield Table(["file", "what", "rows"], rows)


def _with_source(picture: Picture, name: str) -> Picture:
    """A picture with a link to its numbers."""
    file = f"{FOLDER}/{name}.csv"
    return replace(picture, link=Link(f"Data: {file}", file))
