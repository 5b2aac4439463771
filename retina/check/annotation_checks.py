"""Checks of what the annotation files say, without opening an image.

`check_errors` and `check_same_categories` are fast, because every training runs them: half a second for 118,000 images.

B images, T annotations, K categories, as in `Annotations`.
"""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from retina.check.box_checks import WRONG_NUMBERS, check_box_numbers, check_boxes, first_equal
from retina.check.findings import Example, Finding, Split, box_finding, image_finding, lower, name_finding
from retina.config import Config
from retina.data.annotations import Annotations

BACKGROUND = ("background", "__background__", "_background_", "bg")
RARE = 10  # training objects
SMALL_IMAGE = 32  # pixels
ELONGATED = 8.0  # longer side / shorter side
BY_CHANCE = 6e-5  # p of shares of a class that differ beyond chance: four standard errors; and by a factor of 2
OTHER_SIZE = 1.5  # ratio of the median sides of the splits


def check_errors(split: Split) -> list[Finding]:
    """The errors of one file."""
    return [*_check_has_objects(split), *_check_listed_twice(split), *check_box_numbers(split)]


def _check_has_objects(split: Split) -> list[Finding]:
    if split.name != "train" or not split.file.crowd.all():
        return []
    text = f"{split.file.path}: no objects to train on (annotations with iscrowd 0)"
    return [Finding("file-refused", split.name, 1, [Example(text)])]


def check_annotations(split: Split, config: Config) -> list[Finding]:
    """The findings about one file, errors included."""
    file = split.file
    errors = check_errors(split)
    boxes_are_usable = not any(finding.code in WRONG_NUMBERS for finding in errors)
    objects_B = np.bincount(file.images[~file.crowd], minlength=len(file.image_ids))
    empty = np.flatnonzero(objects_B == 0)
    crowded = np.flatnonzero(objects_B > config.detect.max_detections)
    return [
        *errors,
        *_check_ids(split),
        *_check_names(split),
        *(check_boxes(split, config) if boxes_are_usable else ()),
        *(image_finding("images-without-objects", split, empty) if 2 * len(empty) > len(file.image_ids) else ()),
        *image_finding("objects-exceed-detections", split, crowded, [f"{objects_B[i]} objects" for i in crowded]),
    ]


def check_same_categories(train: Split, val: Split) -> list[Finding]:
    """The error of two files with different categories."""
    categories = [set(zip(split.file.category_ids, split.file.names, strict=True)) for split in (train, val)]
    only = [("train", categories[0] - categories[1]), ("val", categories[1] - categories[0])]
    texts = [f"{name!r} (id {i}) only in {split}" for split, names in only for i, name in sorted(names)]
    return name_finding("categories-differ", "train and val", texts)


def check_both(train: Split, val: Split) -> list[Finding]:
    """The findings about the two files together, errors included."""
    both = "train and val"
    if different := check_same_categories(train, val):
        return different
    names, num_classes = train.file.names, len(train.file.names)
    objects = np.array([_objects_per_class(split.file, num_classes) for split in (train, val)])  # (2, K)
    total = objects.sum(axis=0)
    unused = [name for name, n in zip(names, total, strict=True) if n == 0 and not _is_background(name)]
    one_split = np.flatnonzero((total > 0) & (objects == 0).any(axis=0))
    rare = np.flatnonzero((objects[0] > 0) & (objects[0] < RARE) & (objects[1] > 0))
    return [
        *name_finding("category-unused", both, unused),
        *name_finding(
            "class-in-one-split",
            both,
            [f"{names[k]}: {objects[0, k]} in train, {objects[1, k]} in val" for k in one_split],
        ),
        *name_finding("class-rare", "train", [f"{names[k]}: {objects[0, k]}" for k in rare]),
        *_check_shares(train.file, val.file),
        *_check_image_sizes(train.file, val.file),
    ]


def _objects_per_class(file: Annotations, num_classes: int) -> NDArray[np.int64]:
    return np.bincount(file.labels[~file.crowd], minlength=num_classes)


def check_categories(splits: Sequence[Split]) -> list[Finding]:
    """The findings about the lists of categories; for equal lists each is made once."""
    lists = {(tuple(split.file.category_ids), tuple(split.file.names)) for split in splits}
    objects = [_objects_per_class(split.file, len(split.file.names)) for split in splits]
    if len(splits) == 2 and len(lists) == 1:
        return _check_categories(splits[0].file, "train and val", objects[0] + objects[1])
    return [
        finding
        for split, count in zip(splits, objects, strict=True)
        for finding in _check_categories(split.file, split.name, count)
    ]


def _check_categories(file: Annotations, split: str, objects_K: NDArray[np.int64]) -> list[Finding]:
    used = Counter(name for name, count in zip(file.names, objects_K, strict=True) if count)
    repeated = [f"{name!r}: {count} times" for name, count in used.items() if count > 1]
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    for name in file.names:
        spellings[" ".join(name.casefold().split())].add(name)
    similar = [", ".join(map(repr, sorted(names))) for names in spellings.values() if len(names) > 1]
    largest = max(file.category_ids)
    gap = [f"{len(file.names)} categories, largest id {largest}"] if largest > 4 * len(file.names) + 10 else []
    background = [repr(name) for name in file.names if _is_background(name)]
    return [
        *name_finding("category-name-repeated", split, repeated),
        *name_finding("category-name-case", split, similar),
        *name_finding("category-id-gap", split, gap),
        *name_finding("category-background", split, background),
    ]


def _is_background(name: str) -> bool:
    return name.strip().casefold() in BACKGROUND


def _check_ids(split: Split) -> list[Finding]:
    file = split.file
    of_all = [Example(f"{file.without_id} of {len(file.ids)} annotations")]
    missing = [Finding("annotation-id-missing", split.name, file.without_id, of_all)] if file.without_id else []
    repeated = np.flatnonzero(first_equal(file.ids) != np.arange(len(file.ids))) if not file.without_id else ()
    crowd = np.flatnonzero(file.crowd)
    return [
        *box_finding("annotation-id-repeated", split, repeated),
        *box_finding("annotation-id-zero", split, np.flatnonzero(file.ids == 0)),
        *missing,
        *(box_finding("crowd-many", split, crowd) if 10 * len(crowd) > len(file.ids) else ()),
    ]


def _check_listed_twice(split: Split) -> list[Finding]:
    """Files with two entries. Equal boxes in both are no error: the image only counts twice."""
    seen: dict[str, int] = {}
    names = map(posixpath.normpath, split.file.file_names.tolist())
    twice = [(image, seen[name]) for image, name in enumerate(names) if seen.setdefault(name, image) != image]
    if not twice:  # sorting all boxes would be slow
        return []
    order = np.argsort(split.file.images, kind="stable")
    starts = np.searchsorted(split.file.images[order], np.arange(len(split.file.image_ids) + 1))
    columns = np.column_stack([split.file.labels, split.file.crowd, split.file.boxes])[order]

    def boxes(image: int) -> list[list[float]]:
        return sorted(columns[starts[image] : starts[image + 1]].tolist())

    findings = image_finding("image-listed-twice", split, [image for image, _ in twice])
    equal = all(boxes(image) == boxes(first) for image, first in twice)
    return lower(findings, "warning") if equal else findings


def _check_names(split: Split) -> list[Finding]:
    file = split.file
    spellings: dict[str, str] = {}
    names = map(posixpath.normpath, file.file_names.tolist())
    case = [image for image, name in enumerate(names) if spellings.setdefault(name.casefold(), name) != name]
    small = np.flatnonzero(np.minimum(file.widths, file.heights) < SMALL_IMAGE)
    ratio_B = np.maximum(file.widths, file.heights) / np.minimum(file.widths, file.heights)
    elongated = np.flatnonzero(ratio_B > ELONGATED)
    return [
        *image_finding("image-name-case", split, case),
        *image_finding("image-small", split, small, _sizes(file, small)),
        *image_finding("image-elongated", split, elongated, _sizes(file, elongated)),
    ]


def _sizes(file: Annotations, images: Iterable[int]) -> list[str]:
    return [f"{file.widths[i]} x {file.heights[i]}" for i in images]


def _check_shares(train: Annotations, val: Annotations) -> list[Finding]:
    """Classes for which the share of the images that contain them differs by a factor of 2, beyond chance."""
    from scipy import stats  # late: it takes half a second, and each training imports this module

    num_classes = len(train.names)
    sizes = np.array([[len(train.image_ids)], [len(val.image_ids)]])
    with_class = []
    for file in (train, val):
        pairs = np.unique(np.column_stack([file.images, file.labels])[~file.crowd], axis=0)
        with_class.append(np.bincount(pairs[:, 1], minlength=num_classes))
    images_2K = np.array(with_class)
    share_2K = images_2K / np.maximum(sizes, 1)
    # Fisher's exact test: the images of the validation are drawn at random from all. A class may be in two images only.
    drawn = stats.hypergeom(sizes.sum(), images_2K.sum(axis=0), sizes[1, 0])
    p_K = 2 * np.minimum(drawn.cdf(images_2K[1]), drawn.sf(images_2K[1] - 1))
    differs = (p_K < BY_CHANCE) & (share_2K.max(axis=0) >= 2 * share_2K.min(axis=0)) & (images_2K > 0).all(axis=0)
    texts = [
        f"{train.names[k]}: in {share_2K[0, k]:.1%} of the training and {share_2K[1, k]:.1%} of the validation images"
        for k in np.flatnonzero(differs)
    ]
    return name_finding("class-shares-differ", "train and val", texts)


def _check_image_sizes(train: Annotations, val: Annotations) -> list[Finding]:
    if not len(train.image_ids) or not len(val.image_ids):
        return []
    medians = [float(np.median(np.sqrt(file.widths * np.float64(file.heights)))) for file in (train, val)]
    if max(medians) < OTHER_SIZE * min(medians):
        return []
    text = f"median side {medians[0]:.0f} pixels in train, {medians[1]:.0f} in val"
    return name_finding("image-sizes-differ", "train and val", [text])
