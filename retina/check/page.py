"""The result of a check as one page with pictures. It has no scripts and loads nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from retina.atomic_files import write_text
from retina.check.advice import Advice
from retina.check.codes import Severity
from retina.check.data_check import DataCheck, Objects
from retina.check.findings import Finding, Split
from retina.check.pictures import draw_example, plot_classes, plot_sizes, training_sheet
from retina.check.text import FIT_HEAD, count_findings, fit_rows, fit_sentences, what_was_read
from retina.config import Config
from retina.data.annotations import DataError
from retina.data.coco import CocoDataset
from retina.plots.document import (
    Beside,
    Block,
    Bullets,
    Code,
    Gallery,
    Heading,
    Paragraph,
    Picture,
    Table,
    photo,
    to_html,
)
from retina.plots.style import PALETTE

COLORS: dict[Severity, str] = {"error": PALETTE[5], "warning": PALETTE[0], "note": PALETTE[1]}
MAX_ROWS = 200  # classes in the table


def write_page(check: DataCheck, file: Path) -> None:
    """Write the findings with pictures, the classes, how the anchors fit, the advice, and a sheet of training images.

    Equal data and configs give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(file, to_html(list(_blocks(check))))


def _blocks(check: DataCheck) -> Iterator[Block]:
    yield Heading(1, "Data check")
    yield from _summary(check)
    yield Heading(2, "Findings")
    yield from _findings(check.findings)
    if any(len(split.file.labels) for split in check.splits):
        yield Heading(2, "Classes")
        yield plot_classes(check)
    if check.objects is not None and len(check.objects.labels):
        yield from _objects(check, check.objects)
    if check.advice:
        yield from _advice(check.advice)
    if check.objects is not None:
        yield from _sheet(check.objects.dataset, check.config)


def _summary(check: DataCheck) -> Iterator[Block]:
    yield Paragraph(f"{count_findings(check).capitalize()}; {what_was_read(check)}.")
    if check.splits:
        head = ["", "images", "objects", "crowd regions", "classes", "median image", "file"]
        yield Table(head, [_split_row(split) for split in check.splits])


def _split_row(split: Split) -> list[str]:
    file = split.file
    size = "-"
    if len(file.image_ids):
        size = f"{np.median(file.widths):.0f} x {np.median(file.heights):.0f}"
    numbers = (len(file.image_ids), (~file.crowd).sum(), file.crowd.sum(), len(file.names))
    return [split.name, *(str(int(number)) for number in numbers), size, str(file.path)]


def _findings(findings: list[Finding]) -> Iterator[Block]:
    if not findings:
        yield Paragraph("Nothing was found.")
        return
    rows = [[f.severity, f.code, f.split, str(f.count), f.texts.title] for f in findings]
    yield Table(["severity", "finding", "split", "count", "what"], rows, links=frozenset(f.code for f in findings))
    seen: set[str] = set()
    for finding in findings:
        yield _finding(finding, "" if finding.code in seen else finding.code)
        seen.add(finding.code)


def _finding(finding: Finding, name: str) -> Beside:
    """`name`: what the table links to."""
    texts = finding.texts
    places = [example.text for example in finding.examples]
    if finding.num_more:
        places.append(f"... and {finding.num_more} more")
    picture = _worst_image(finding)
    unreadable = picture is None and any(example.image for example in finding.examples)
    blocks: list[Heading | Paragraph | Bullets] = [
        Heading(3, f"{finding.severity}: {finding.code} ({finding.split})", name),
        Paragraph(f"{texts.title[0].upper()}{texts.title[1:]} ({finding.count})"),
        Bullets(places),
        Paragraph(texts.effect, "Effect:"),
        Paragraph(texts.advice, "What to do:"),
        *([Paragraph("There is no picture, because none of these images can be read.")] if unreadable else []),
    ]
    return Beside(blocks, picture, COLORS[finding.severity])


def _worst_image(finding: Finding) -> Picture | None:
    """The first image of a finding that can be read, with its boxes."""
    for example in finding.examples:
        if example.image is None:
            continue
        try:
            image = draw_example(example)
        except DataError:
            continue
        return photo(image, example.text, image.width, example.text.partition(": bbox")[0])
    return None


def _objects(check: DataCheck, objects: Objects) -> Iterator[Block]:
    yield Heading(2, "What the detector will see")
    yield Paragraph(
        f"At the sizes and anchors of the config, without augmentation ({objects.fit.images} training images):"
    )
    yield Bullets(fit_sentences(objects.fit))
    yield plot_sizes(objects, check.config)
    rows = fit_rows(check, objects)
    yield Table(FIT_HEAD, rows[: MAX_ROWS + 1], bold=0)
    if len(rows) > MAX_ROWS + 1:
        yield Paragraph(f"... and {len(rows) - MAX_ROWS - 1} more classes")
    yield Paragraph(
        f"The IoU is that with the best anchor, and assign.positive_iou is {check.config.assign.positive_iou:g}. "
        "Centered: if the anchor had the same center as the object."
    )


def _advice(advice: list[Advice]) -> Iterator[Block]:
    yield Heading(2, "Advice")
    yield Paragraph("Settings to try, with their reasons:")
    yield Table(["setting", "reason"], [[item.setting, item.reason] for item in advice])
    sections: defaultdict[str, list[str]] = defaultdict(list)
    for item in advice:
        key, _, value = item.setting.partition("=")
        section, _, name = key.partition(".")
        sections[section].append(f"  {name}: {value}")
    yield Paragraph("As lines of the config:")
    yield Code("\n".join(line for section, lines in sections.items() for line in (f"{section}:", *lines)))


def _sheet(dataset: CocoDataset, config: Config) -> Iterator[Block]:
    sheet = training_sheet(dataset, config)
    yield Heading(2, "What the network gets")
    yield Paragraph(
        f"The first {len(sheet.pictures)} images of a training with seed {config.seed}, after augmentation. Gray at "
        "the right or the bottom is padding to the size of the batch. The boxes are those that the loss gets; regions "
        "with a dashed outline are ignored. A click enlarges an image."
    )
    if sheet.unreadable:
        yield Paragraph(f"Left out, because they cannot be read: {'; '.join(sheet.unreadable[:10])}.")
    yield Gallery(sheet.pictures)
