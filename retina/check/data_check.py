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
from retina.check.anchor_fit import AnchorFit, check_fit, measure_fit, resized_objects, shape_iou
from retina.check.annotation_checks import (
    check_annotations,
    check_both,
    check_categories,
    check_errors,
    check_same_categories,
)
from retina.check.box_checks import WRONG_NUMBERS
from retina.check.findings import Example, Finding, Split, lower, sort_findings
from retina.check.image_checks import ImageFacts, Progress, check_copies, check_files, read_all_facts
from retina.config import Config
from retina.data.annotations import DataError, read_annotations
from retina.data.coco import CocoDataset

PIXELS_BELOW = 20_000  # images, below which pixels are read by default
SAMPLE = 200  # image files of each split that a training looks at before it starts
MAX_CLASSES = 2**15 - 1  # assign.py stores labels in 16 bits


class Objects(NamedTuple):
    """The objects of the training data as the network gets them, without augmentation."""

    sizes: NDArray[np.float64]  # (T, 2) width and height in pixels of the resized image
    labels: NDArray[np.int64]  # (T,)
    centered_iou: NDArray[np.float64]  # (T,) with the best anchor, if it had the same center
    fit: AnchorFit
    dataset: CocoDataset


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
        return sum(finding.severity == severity for finding in self.findings)


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
            split = Split(name, read_annotations(Path(file)), Path(folder))
            if not len(split.file.image_ids):
                raise DataError(f"{file}: no images to use")
            splits.append(split)
        except DataError as error:
            findings.append(Finding("file-refused", name, 1, [Example(str(error))]))
    if pixels is None:
        pixels = sum(len(split.file.image_ids) for split in splits) < PIXELS_BELOW
    datasets: dict[str, CocoDataset] = {}
    all_facts = []
    for split in splits:
        findings += check_annotations(split, config)
        used = np.arange(len(split.file.image_ids))
        try:
            datasets[split.name] = _dataset(split, config)
            used = np.sort(datasets[split.name].records.positions)
        except DataError as error:
            if split.folder.is_dir():  # otherwise its images are reported as missing
                findings.append(Finding("file-refused", split.name, 1, [Example(str(error))]))
        facts = [ImageFacts("unused")] * len(split.file.image_ids)
        for image, fact in zip(used.tolist(), read_all_facts(split, used, pixels, progress), strict=True):
            facts[image] = fact
        all_facts.append(facts)
        findings += _check_files(split, used, [facts[image] for image in used], config)
    findings += check_categories(splits)
    if len(splits) == 2:
        findings += check_both(*splits)
        findings += check_copies((splits[0], all_facts[0]), (splits[1], all_facts[1]))
    objects, advice = None, []
    dataset = datasets.get("train")
    if dataset is not None and not WRONG_NUMBERS & {f.code for f in findings if f.split == "train"}:
        sizes, labels = resized_objects(dataset, config)
        centered_iou = shape_iou(sizes, config.anchors, 0.0)
        objects = Objects(sizes, labels, centered_iou, measure_fit(dataset, config, progress), dataset)
        findings += check_fit(splits[0], objects.fit, config)
        advice = advise(dataset, sizes, labels, objects.fit, config)
    return DataCheck(config, splits, sort_findings(findings), objects, advice, pixels)


def _check_files(split: Split, images: NDArray[np.int64], facts: list[ImageFacts], config: Config) -> list[Finding]:
    """The findings about files. With `data.unreadable=skip` a training goes on, so none is an error."""
    findings = check_files(split, images, facts)
    if config.data.unreadable == "error":
        return findings
    return [lower([finding], "warning")[0] if finding.severity == "error" else finding for finding in findings]


def _dataset(split: Split, config: Config) -> CocoDataset:
    """The data set as the training opens it.

    Raises:
        DataError: the training would refuse it.
    """
    if len(split.file.names) > MAX_CLASSES:
        raise DataError(f"{split.file.path}: {len(split.file.names)} categories, expected at most {MAX_CLASSES}")
    if split.name == "val":
        return CocoDataset(split.file.path, split.folder, file=split.file)
    data = config.data
    return CocoDataset(split.file.path, split.folder, crowd=data.crowd, empty_images=data.empty_images, file=split.file)


def quick_check(train: CocoDataset, val: CocoDataset, config: Config) -> list[Finding]:
    """The errors that a training should not start with: in the annotations, and in a sample of the image files.

    The headers of up to SAMPLE files of each split are read, evenly spaced; with `data.unreadable=skip` none.
    """
    splits = [Split("train", train.file, train.folder), Split("val", val.file, val.folder)]
    findings = check_categories(splits) + check_same_categories(*splits)
    for split, dataset in zip(splits, (train, val), strict=True):
        findings += check_errors(split)
        if config.data.unreadable == "error":
            images = np.sort(dataset.evenly_spaced(SAMPLE).records.positions)
            findings += check_files(split, images, read_all_facts(split, images, False, _without_progress))
    return sort_findings([finding for finding in findings if finding.severity == "error"])


def _without_progress(iterable: Iterable[Any], _: int) -> Iterable[Any]:
    return iterable
