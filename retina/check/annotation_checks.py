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

from retina.check.findings import MAX_EXAMPLES, Example, Finding, Split, box_finding, image_finding, lower, name_finding
from retina.config import Config
from retina.data.annotations import Annotations
from retina.data.augment import resized_size

BACKGROUND = ("background", "__background__", "_background_", "bg")
MIN_SIDE = 2.0  # pixels of a box at the training size
RARE = 10  # training objects
SMALL_IMAGE = 32  # pixels
ELONGATED = 8.0  # longer side / shorter side
OTHER_SHARE = 4.0  # standard errors between the shares of a class in the splits, and at least a factor of 2
OTHER_SIZE = 1.5  # ratio of the median sides of the splits
FEW = 0.01  # share of the boxes, up to which wrong ones do not stop a training
MANY_WHOLE = 0.05  # share of the images with a box that covers all
WRONG_NUMBERS = {"boxes-normalized", "boxes-xyxy", "boxes-centered"}  # of such boxes nothing else can be said


def check_errors(split: Split) -> list[Finding]:
    """The errors of one file."""
    return [*_check_listed_twice(split), *_check_box_numbers(split)]


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
        *(_check_boxes(split, config) if boxes_are_usable else ()),
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
    repeated = np.flatnonzero(_first_equal(file.ids) != np.arange(len(file.ids))) if not file.without_id else ()
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


def _check_box_numbers(split: Split) -> list[Finding]:
    """Boxes that are not [x, y, width, height] in pixels."""
    file = split.file
    if not len(file.boxes):
        return []
    x, y, w, h = file.boxes.T
    image_w, image_h = file.widths[file.images], file.heights[file.images]
    normalized = ((file.boxes >= 0) & (file.boxes <= 1)).all(axis=1) & (w > 0) & (h > 0)
    if normalized.mean() >= 0.9 and np.median(image_w) > 2:
        return box_finding("boxes-normalized", split, np.flatnonzero(normalized))
    outside = _pixels_outside(file)
    out = outside > 1
    far_out = outside > 0.05 * np.maximum(image_w, image_h)
    as_corners = (x >= -1) & (y >= -1) & (w > x) & (h > y) & (w <= image_w + 1) & (h <= image_h + 1)
    if len(out) >= 10 and far_out.mean() >= 0.1 and as_corners.mean() >= 0.95:
        return box_finding("boxes-xyxy", split, np.flatnonzero(out))
    with np.errstate(over="ignore", invalid="ignore"):
        as_centered = np.minimum(x - w / 2, y - h / 2) >= -1
        as_centered &= (x + w / 2 <= image_w + 1) & (y + h / 2 <= image_h + 1)
    if len(out) >= 20 and out.mean() >= 0.05 and as_centered.mean() >= 0.99:
        return box_finding("boxes-centered", split, np.flatnonzero(out))
    negative = (w < 0) | (h < 0)
    findings = box_finding("box-negative", split, np.flatnonzero(negative))
    return lower(findings, "warning") if negative.mean() <= FEW else findings


def _pixels_outside(file: Annotations) -> NDArray[np.float64]:
    """(T,) by how many pixels a box reaches out of its image; negative if it is inside."""
    x, y, w, h = file.boxes.T
    with np.errstate(over="ignore", invalid="ignore"):
        edges = [-x, -y, x + w - file.widths[file.images], y + h - file.heights[file.images]]
    return np.asarray(np.maximum.reduce(edges))


def _check_boxes(split: Split, config: Config) -> list[Finding]:
    file = split.file
    x, y, w, h = file.boxes.T
    image_w, image_h = file.widths[file.images], file.heights[file.images]
    out = _pixels_outside(file)
    with np.errstate(over="ignore", invalid="ignore"):
        negative = (w < 0) | (h < 0)
        without_area = ((w == 0) | (h == 0)) & ~negative
        outside = ((x >= image_w) | (y >= image_h) | (x + w <= 0) | (y + h <= 0)) & ~negative & ~without_area
        clipped = (out > 1) & ~outside & ~negative & ~without_area
        usable = ~(negative | without_area | outside)
        whole = usable & (w >= 0.99 * image_w) & (h >= 0.99 * image_h) & ~file.crowd
        largest = (w + 2) * (h + 2)  # of the pixels that a box touches
        area = ((file.areas <= 0) | (file.areas > largest)) & usable
    many_whole = MANY_WHOLE * len(file.image_ids)
    worst_first = np.argsort(-np.where(clipped, out, -np.inf))[: clipped.sum()]
    return [
        *box_finding("box-without-area", split, np.flatnonzero(without_area)),
        *box_finding("box-outside", split, np.flatnonzero(outside)),
        *box_finding("box-clipped", split, worst_first),
        *box_finding("box-tiny", split, np.flatnonzero(usable & _is_tiny(file, config))),
        *(box_finding("box-whole-image", split, np.flatnonzero(whole)) if whole.sum() > many_whole else ()),
        *box_finding("area-contradicts-box", split, np.flatnonzero(area)),
        *_check_repeated_boxes(split, np.flatnonzero(usable & ~file.crowd)),
    ]


def _is_tiny(file: Annotations, config: Config) -> NDArray[np.bool_]:
    """(T,) whether a side is below MIN_SIDE pixels in the resized image."""
    short_side = config.data.eval_short_side or config.data.short_side[-1]
    sizes = zip(file.heights.tolist(), file.widths.tolist(), strict=True)
    heights_B = np.array([resized_size(height, width, short_side, config.data)[0] for height, width in sizes])
    scale_T = (heights_B / file.heights)[file.images]
    return np.asarray(file.boxes[:, 2:].min(axis=1) * scale_T < MIN_SIDE)


def _check_repeated_boxes(split: Split, annotations: NDArray[np.int64]) -> list[Finding]:
    """Boxes of one image with equal corners in whole pixels."""
    file = split.file
    if not len(annotations):
        return []
    corners = np.rint(np.clip(file.boxes[annotations], -(2**40), 2**40)).astype(np.int64)
    place = _groups(np.column_stack([file.images[annotations], corners]))
    everything = np.arange(len(annotations))
    at_place = _first_equal(place)
    of_class = _first_equal(place * len(file.names) + file.labels[annotations])
    repeated = np.flatnonzero(of_class != everything)
    two_classes = np.flatnonzero((of_class == everything) & (at_place != everything))

    def other(index: int) -> str:
        return f"annotation {file.ids[annotations[index]]}"

    def name(index: int) -> str:
        return file.names[int(file.labels[annotations[index]])]

    copies = [f"as {other(of_class[i])}" for i in repeated[:MAX_EXAMPLES]]
    classes = [f"{name(i)}; {other(at_place[i])} is {name(at_place[i])}" for i in two_classes[:MAX_EXAMPLES]]
    return [
        *box_finding("box-repeated", split, annotations[repeated], copies),
        *box_finding("box-two-classes", split, annotations[two_classes], classes),
    ]


def _first_equal(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each value the index of the first that equals it, (T,)."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[group])


def _groups(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of the group of equal rows to which each row of (T, C) belongs, (T,)."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _check_shares(train: Annotations, val: Annotations) -> list[Finding]:
    """Classes for which the share of the images that contain them differs by a factor of 2, beyond chance."""
    num_classes = len(train.names)
    sizes = np.array([[len(train.image_ids)], [len(val.image_ids)]])
    with_class = []
    for file in (train, val):
        pairs = np.unique(np.column_stack([file.images, file.labels])[~file.crowd], axis=0)
        with_class.append(np.bincount(pairs[:, 1], minlength=num_classes))
    images_2K = np.array(with_class)
    share_2K = images_2K / np.maximum(sizes, 1)
    pooled_K = images_2K.sum(axis=0) / max(sizes.sum(), 1)
    error_K = np.sqrt(pooled_K * (1 - pooled_K) * (1 / np.maximum(sizes, 1)).sum())
    difference_K = np.abs(share_2K[0] - share_2K[1])
    differs = (difference_K > OTHER_SHARE * error_K) & (share_2K.max(axis=0) >= 2 * share_2K.min(axis=0))
    differs &= (images_2K > 0).all(axis=0)
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
