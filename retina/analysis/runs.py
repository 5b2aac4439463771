"""Finds and reads what runs wrote: their detections, and the annotations and images that their config names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from retina.analysis.results_file import Results, ResultsError, read_results
from retina.config_file import KEYS_WITHOUT_EFFECT, ConfigError, changed_keys, load_config
from retina.data.annotations import Annotations, DataError, read_annotations

DETECTIONS, EVALUATIONS = "detections.json", "eval.json"


class Run(NamedTuple):
    """The detections of one run or results file."""

    name: str
    results: Results
    last_ap: float | None = None  # of the last evaluation of the training, from 0 to 1; None where it is not known


class RunData(NamedTuple):
    """Runs on one data set."""

    annotations: Annotations
    images: Path | None  # folder of the image files
    sides: list[list[Run]]
    differences: list[str]  # keys of the settings other than the seed that differ between trainings of one side


def read_runs(sides: Sequence[Sequence[Path]], annotations: Path | None, images: Path | None) -> RunData:
    """Read the runs of all sides.

    Args:
        sides: run folders, or files in COCO's results format.
        annotations: of the images; None uses those of each run's config.yaml.
        images: their folder; None uses that of the first run's config.yaml, if there is one.

    Raises:
        ResultsError: a run has no detections, or detections that cannot be scored; the runs are on different data sets,
            or detected on other images than those of `annotations`; two trainings of one side have the same seed.
        DataError: the annotations cannot be read.
        ConfigError: a config.yaml cannot be read.
        OSError: a path cannot be looked at, as in a folder without permission.
    """
    paths = [path for side in sides for path in side]
    data = {path: _data_of(path, annotations, images) for path in paths}
    files = {path: read_annotations(path) for path in {file for file, _ in data.values()}}
    first, *others = paths
    for other in others:
        _check_equal(first, files[data[first][0]], other, files[data[other][0]])
    file = files[data[first][0]]
    if annotations is not None:
        # The first run of each annotation file: runs of one study have the same, and it may be large.
        evaluated_on = {_own_annotations(path): path for path in reversed(paths)}
        for own, path in evaluated_on.items():
            if own is not None and own != annotations:
                _check_images(path, own, file)
    last_aps = {path: None if annotations else _last_ap(path) for path in paths}  # measured with its own annotations
    read = {path: Run(str(path), read_results(_detections_of(path), file), last_aps[path]) for path in paths}
    folder = next((folder for _, folder in data.values() if folder), None)
    differences = sorted({key for side in sides for key in _differing_settings(side)})
    return RunData(file, folder, [[read[p] for p in side] for side in sides], differences)


def repeated_run(paths: Sequence[Path]) -> Path | None:
    """The first of `paths` whose detections are those of one before it, also by another path; None without one."""
    files = [(path / DETECTIONS if path.is_dir() else path).resolve() for path in paths]
    return next((path for i, path in enumerate(paths) if files[i] in files[:i]), None)


def _detections_of(path: Path) -> Path:
    if not path.exists():
        raise ResultsError(f"{path}: no such run folder or results file")
    if path.suffix in (".pt", ".pth"):
        raise ResultsError(f"{path}: is a checkpoint; give the folder of the run, or its {DETECTIONS}")
    if path.is_file():
        return path
    if not (path / DETECTIONS).is_file():
        raise ResultsError(
            f"{path}: has no {DETECTIONS}; a training writes it when it evaluates, and tools/eval.py --output {path} "
            "for a checkpoint"
        )
    return path / DETECTIONS


def _data_of(path: Path, annotations: Path | None, images: Path | None) -> tuple[Path, Path | None]:
    """The annotation file of a run, and its folder of images: what is given, and what its config.yaml says if not."""
    folder = _detections_of(path).parent
    if annotations is not None and (images is not None or not (folder / "config.yaml").is_file()):
        return annotations, images
    if not (folder / "config.yaml").is_file():
        raise ResultsError(f"{path}: no config.yaml beside the detections; give --annotations FILE for their images")
    data = load_config(folder / "config.yaml").data
    return annotations or Path(data.val_annotations), images or Path(data.val_images)


def _last_ap(path: Path) -> float | None:
    """AP of the last evaluation of a run folder."""
    file = path / EVALUATIONS
    if not file.is_file():
        return None
    try:
        evaluations = json.loads(file.read_text(encoding="utf-8"))
        return evaluations[-1]["AP"] if evaluations else None
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{file}: is damaged ({error}); without this file the run can be compared") from None


def _differing_settings(side: Sequence[Path]) -> set[str]:
    """The keys other than the seed in which the trainings of a side differ. ResultsError for two equal trainings."""
    files = [_detections_of(path).parent / "config.yaml" for path in side]
    configs = []
    for path, file in zip(side, files, strict=True):
        with suppress(ConfigError):  # of another version of the program
            configs += [(path, load_config(file))] if file.is_file() else []
    differing: set[str] = set()
    for (one, first), (two, second) in combinations(configs, 2):
        keys = changed_keys(first, second, (*KEYS_WITHOUT_EFFECT, "name"))
        if not keys:
            raise ResultsError(
                f"{one} and {two} have the same settings and the same seed; a side has trainings with different seeds"
            )
        differing |= {*keys} - {"seed"}
    return differing


def _check_equal(first: Path, a: Annotations, other: Path, b: Annotations) -> None:
    """Raise ResultsError if two annotation files do not say the same about images, categories and objects."""
    if a is b:
        return
    parts = {
        "images": (np.sort(a.image_ids), np.sort(b.image_ids)),
        "categories": (np.array(a.category_ids), np.array(b.category_ids)),
        "boxes": (_objects(a), _objects(b)),
    }
    for name, (one, two) in parts.items():
        if one.shape != two.shape or (one != two).any():
            raise ResultsError(
                f"the runs are on different data sets: {first} on {a.path}, {other} on {b.path}; the {name} differ "
                f"({len(one)} and {len(two)}). Evaluate both on one file: tools/eval.py RUN data.val_annotations=FILE "
                "data.val_images=FOLDER --output DIR; then compare the two DIR. If only the boxes were corrected, "
                "--annotations FILE compares the detections that there are"
            )


def _own_annotations(path: Path) -> Path | None:
    """The annotation file that the config.yaml of a run names; None without one, or with one of another version."""
    try:
        return Path(load_config(_detections_of(path).parent / "config.yaml").data.val_annotations)
    except ConfigError:
        return None


def _check_images(path: Path, own_file: Path, file: Annotations) -> None:
    """Raise ResultsError if a run, evaluated on `own_file`, detected on other images than those of `file`."""
    try:
        own = read_annotations(own_file)
    except DataError:
        return  # the file is gone: nothing is known about the images
    names = dict(zip(own.image_ids.tolist(), own.file_names.tolist(), strict=True))
    for number, name in zip(file.image_ids.tolist(), file.file_names.tolist(), strict=True):
        if PurePath(names.get(number, "")).name != PurePath(name).name:  # the folder may be written in another way
            raise ResultsError(
                f"{path}: its detections are not of the images of {file.path}: the image of id {number} is {name} "
                f"there, and {names.get(number, 'none')} in {own.path}, on which it was evaluated; evaluate it on "
                f"that file: tools/eval.py {path} data.val_annotations={file.path} data.val_images=FOLDER "
                "--output DIR; then compare DIR"
            )


def _objects(file: Annotations) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The objects of a file in an order that does not depend on that of the file."""
    columns = np.column_stack(
        [file.image_ids[file.images], np.array(file.category_ids)[file.labels], file.boxes, file.areas, file.crowd]
    )
    return columns[np.lexsort(columns.T[::-1])]
