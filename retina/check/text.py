"""The result of a check as text for the terminal."""

from __future__ import annotations

import textwrap
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retina.check.anchor_fit import AnchorFit
from retina.check.data_check import DataCheck, Objects
from retina.check.findings import Finding
from retina.plural import plural

WIDTH = 110  # columns
SIDE_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512, np.inf)  # pixels, of the histogram of object sizes
MAX_CLASSES = 20  # rows of the table of classes


def format_check(check: DataCheck) -> str:
    """All findings, what the detector will see, and the advice."""
    parts = [_summary(check), *(_format_finding(finding) for finding in check.findings)]
    if check.objects is not None and len(check.objects.labels):
        parts += [_format_objects(check, check.objects)]
    if check.advice:
        parts.append(_format_advice(check))
    # Names and paths come from the files: no character of them may control the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n\n".join(parts))


def _summary(check: DataCheck) -> str:
    lines = []
    for split in check.splits:
        objects, crowds = int((~split.file.crowd).sum()), int(split.file.crowd.sum())
        counts = [(len(split.file.image_ids), "image"), (objects, "object"), (len(split.file.names), "class")]
        counts += [(crowds, "crowd region")] * (crowds > 0)
        lines.append(f"{split.name}: {', '.join(plural(*count) for count in counts)}  ({split.file.path})")
    return "\n".join([*lines, f"{what_was_read(check)}; {count_findings(check)}"])


def what_was_read(check: DataCheck) -> str:
    """What the check read of the image files."""
    return "every image decoded" if check.pixels else "headers of the images read; --pixels decodes them too"


def count_findings(check: DataCheck) -> str:
    """ "2 errors, 1 warning", or "no findings"."""
    counts = [(check.count("error"), "error"), (check.count("warning"), "warning"), (check.count("note"), "note")]
    return ", ".join(plural(*count) for count in counts if count[0]) or "no findings"


def _format_finding(finding: Finding) -> str:
    texts = finding.texts
    lines = [f"{finding.severity.upper()} {finding.code} in {finding.split}: {texts.title} ({finding.count})"]
    for line in (line for example in finding.examples for line in example.text.splitlines()):
        lines += textwrap.wrap(line, WIDTH, initial_indent="    ", subsequent_indent="      ")
    if finding.num_more:
        lines.append(f"    ... and {finding.num_more} more")
    lines += textwrap.wrap(texts.effect, WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += textwrap.wrap(f"What to do: {texts.advice}", WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def fit_rows(check: DataCheck, objects: Objects) -> list[list[str]]:
    """For all objects and for each class: name, objects, median side in pixels, percent below the positive IoU at the
    center and where they are, positive anchors per object, percent without an anchor."""
    fit, threshold = objects.fit, check.config.assign.positive_iou
    names = check.splits[0].file.names

    def row(name: str, in_all: NDArray[np.bool_], in_fit: NDArray[np.bool_]) -> list[str]:
        side = np.median(np.sqrt(objects.sizes[in_all].prod(axis=1))) if in_all.any() else 0
        centered = f"{100 * (objects.centered_iou[in_all] < threshold).mean():.1f}" if in_all.any() else "-"
        cells = [name, str(int(in_all.sum())), f"{side:.0f}", centered]
        if not in_fit.any():
            return [*cells, "-", "-", "-"]
        below, without = ((column[in_fit]).mean() for column in (fit.best_iou < threshold, fit.num_anchors == 0))
        return [*cells, f"{100 * below:.1f}", f"{fit.num_anchors[in_fit].mean():.1f}", f"{100 * without:.1f}"]

    rows = [row("all", np.ones(len(objects.labels), np.bool_), np.ones(len(fit.labels), np.bool_))]
    by_count = np.argsort(-np.bincount(objects.labels, minlength=len(names)), kind="stable")
    return rows + [row(names[k], objects.labels == k, fit.labels == k) for k in by_count]


FIT_HEAD = ["class", "objects", "side px", "% below IoU centered", "% below IoU", "anchors/object", "% without anchor"]


def fit_sentences(fit: AnchorFit) -> list[str]:
    """The matching of the anchors in numbers."""
    ratio = f"{fit.negatives / fit.positives:,.0f} negatives for a positive" if fit.positives else "no positives"
    sentences = [
        f"{fit.anchors / fit.images:,.0f} anchors and {fit.positives / fit.images:.1f} positives per image, {ratio}"
    ]
    if len(fit.labels):
        shared = 100 * fit.shares_anchor.mean()
        sentences.append(f"{shared:.1f} % of the objects share their best anchor with another object")
    return sentences


def _format_objects(check: DataCheck, objects: Objects) -> str:
    rows, num_images = fit_rows(check, objects), objects.fit.images
    shown = rows[: MAX_CLASSES + 1]
    widths = [max(len(row[i]) for row in [FIT_HEAD, *shown]) for i in range(len(FIT_HEAD))]
    table = [
        "  "
        + "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [FIT_HEAD, *shown]
    ]
    if len(rows) > len(shown):
        table.append(f"  ... and {len(rows) - len(shown)} more classes")
    return "\n".join(
        [
            f"What the detector will see, at the sizes and anchors of the config ({num_images} training images):",
            *(f"  {sentence}" for sentence in fit_sentences(objects.fit)),
            "",
            *table,
            f"  below IoU: no anchor has an IoU of {check.config.assign.positive_iou:g} (assign.positive_iou) with the",
            "  object; centered: not even one with the same center",
            "",
            "  Objects by side (square root of the area) in pixels of the resized images:",
            *_histogram(objects.sizes),
        ]
    )


def side_histogram(sizes: NDArray[np.float64]) -> list[tuple[str, int]]:
    """(range of sides in pixels, number of objects), without the empty ranges at the ends."""
    counts, _ = np.histogram(np.sqrt(sizes.prod(axis=1)), np.array(SIDE_EDGES))
    used = np.flatnonzero(counts)
    labels = [f"{low:.0f} to {high:.0f}" for low, high in pairwise(SIDE_EDGES[:-1])]
    labels.append(f"{SIDE_EDGES[-2]:.0f} and more")
    return [(labels[i], int(counts[i])) for i in range(used[0], used[-1] + 1)] if len(used) else []


def _histogram(sizes: NDArray[np.float64]) -> list[str]:
    bars = side_histogram(sizes)
    most = max(count for _, count in bars)
    return [f"  {label:>12}  {'#' * round(50 * count / most):<50}  {count}" for label, count in bars]


def _format_advice(check: DataCheck) -> str:
    lines = ["Advice: settings to try, with their reasons"]
    for item in check.advice:
        lines.append(f"  {item.setting}")
        lines += textwrap.wrap(item.reason, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
