"""Checks both data sets of a config and says what the detector will see of them, as `tools/check_data.py` prints it.

`quick_check` is the part that every training runs before its first step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retina.check.advice import Advice, advise
from retina.check.anchor_fit import AnchorFit, check_fit, measure_fit, resized_objects
from retina.check.annotation_checks import check_annotations, check_both
from retina.check.findings import Example, Finding, Split, sort_findings
from retina.check.image_checks import ImageFacts, Progress, check_copies, check_files, read_all_facts
from retina.config import Config
from retina.data.annotations import DataError, read_annotations
from retina.data.coco import CocoDataset

PIXELS_BELOW = 20_000  # images, below which pixels are read by default
SAMPLE = 200  # image files of each split that a training looks at before it starts


class Objects(NamedTuple):
    """The objects of the training data as the network gets them, without augmentation."""

    sizes: NDArray[np.float64]  # (T, 2) width and height in pixels of the resized image
    labels: NDArray[np.int64]  # (T,)
    fit: AnchorFit


class DataCheck(NamedTuple):
    """The result of `check_data`."""

    config: Config
    splits: list[Split]  # those that could be read
    findings: list[Finding]  # errors first
    objects: Objects | None  # None where the training data cannot be read
    advice: list[Advice]
    pixels: bool  # whether pixels were read, or headers alone

    def count(self, severity: Literal["error", "warning", "note"]) -> int:
        """The number of findings of a severity."""
        return sum(finding.texts.severity == severity for finding in self.findings)


def check_data(config: Config, pixels: bool | None, progress: Progress) -> DataCheck:
    """Read both annotation files and open every image.

    Args:
        config: names the files, and the sizes and anchors of the detector.
        pixels: whether to decode the images; None does it if both splits together have fewer than PIXELS_BELOW.
        progress: wraps an iterable of known length, for a progress bar.
    """
    findings: list[Finding] = []
    splits = []
    data = config.data
    paths = (("train", data.train_annotations, data.train_images), ("val", data.val_annotations, data.val_images))
    for name, file, folder in paths:
        try:
            splits.append(Split(name, read_annotations(Path(file)), Path(folder)))
        except DataError as error:
            findings.append(Finding("file-refused", name, 1, [Example(str(error))]))
    if pixels is None:
        pixels = sum(len(split.file.image_ids) for split in splits) < PIXELS_BELOW
    all_facts = []
    for split in splits:
        findings += check_annotations(split, config)
        images = np.arange(len(split.file.image_ids))
        all_facts.append(read_all_facts([split.image_path(int(i)) for i in images], pixels, progress))
        findings += check_files(split, images, all_facts[-1])
    if len(splits) == 2:
        findings += check_both(*splits)
        findings += check_copies((splits[0], all_facts[0]), (splits[1], all_facts[1]))
    objects, advice = None, []
    if splits and splits[0].name == "train" and (dataset := training_data(splits[0], config)) is not None:
        sizes, labels = resized_objects(dataset, config)
        objects = Objects(sizes, labels, measure_fit(dataset, config))
        findings += check_fit(splits[0], dataset, objects.fit, config)
        advice = advise(dataset, sizes, labels, objects.fit, config)
    return DataCheck(config, splits, sort_findings(findings), objects, advice, pixels)


def training_data(split: Split, config: Config) -> CocoDataset | None:
    """What the training uses of the file; None where it would not start."""
    try:
        return CocoDataset(
            split.file.path,
            split.folder,
            crowd=config.data.crowd,
            empty_images=config.data.empty_images,
            file=split.file,
        )
    except DataError:  # no folder, which check_files has found, or no image with objects
        return None


def quick_check(train: CocoDataset, val: CocoDataset, config: Config) -> list[Finding]:
    """The errors that a training should not start with: in the annotations, and in a sample of the image files.

    The headers of up to SAMPLE files of each split are read, evenly spaced; with `data.unreadable=skip` none.
    """
    splits = [Split("train", train.file, train.folder), Split("val", val.file, val.folder)]
    findings = check_both(*splits)
    for split in splits:
        findings += check_annotations(split, config)
        if config.data.unreadable == "error":
            total = len(split.file.image_ids)
            images = np.unique(np.linspace(0, total - 1, min(SAMPLE, total)).astype(np.int64))
            findings += check_files(split, images, _headers(split, images))
    return sort_findings([finding for finding in findings if finding.texts.severity == "error"])


def _headers(split: Split, images: NDArray[np.int64]) -> list[ImageFacts]:
    def without_progress(iterable: Iterable[Any], _: int) -> Iterable[Any]:
        return iterable

    return read_all_facts([split.image_path(int(i)) for i in images], False, without_progress)
