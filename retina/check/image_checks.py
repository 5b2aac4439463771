"""Checks that open every image: of its header alone, or of its pixels too.

`read_facts` opens one file and raises nothing. `check_files` and `check_copies` make findings of the facts.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from retina.check.findings import MAX_EXAMPLES, Finding, Split, image_finding
from retina.cores import available_cores
from retina.data.coco import to_rgb
from retina.exif import SWAPS_SIDES, exif_orientation

Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # wraps an iterable of known length
THUMBNAIL = 32  # pixels of a side, for the comparison of images
SIMILAR = 0.99  # correlation of the thumbnails of near-duplicates
MIN_FOR_MEAN = 20  # training images, from which their mean is subtracted before images are compared
FAINT = 32  # of 256 levels, below which almost nothing is left of an image of 16 bits
ENDS = 4096  # bytes at both ends of files of equal length, which are compared first


class ImageFacts(NamedTuple):
    """What is known of an image file. `problem` is "missing", "unreadable", "truncated", "unused" or empty."""

    problem: str
    detail: str = ""
    width: int = 0  # pixels, as stored
    height: int = 0
    mode: str = ""  # of PIL
    orientation: int = 1  # the EXIF tag
    frames: int = 1
    num_bytes: int = 0
    transparent: bool = False
    constant: bool = False  # these three only where pixels are read
    levels: int = 256  # between the darkest and the brightest value that the network gets
    thumbnail: NDArray[np.uint8] | None = None  # gray, (THUMBNAIL, THUMBNAIL)


def read_facts(path: Path, size: tuple[int, int], pixels: bool) -> ImageFacts:
    """Open an image file. Without `pixels` only its header is read, which cannot show a file that ends too early.

    `size`: (width, height) in the JSON. An image of another size is not decoded: it may claim billions of pixels.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return ImageFacts("missing")
    except (OSError, ValueError) as error:
        return ImageFacts("missing", getattr(error, "strerror", None) or str(error))
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait forever
        return ImageFacts("unreadable", "it is not a file")
    if not status.st_size:
        return ImageFacts("unreadable", "the file is empty")
    try:
        with Image.open(path) as image:
            facts = ImageFacts(
                "",
                "",
                *image.size,
                mode=image.mode,
                orientation=exif_orientation(image),
                num_bytes=status.st_size,
                transparent=image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
            )
            if pixels and size in (image.size, image.size[::-1]):
                facts = _with_pixels(facts, image)
            return facts if facts.problem else facts._replace(frames=_num_frames(image))
    except UnidentifiedImageError:
        return ImageFacts("unreadable", "it is in no image format that PIL knows", num_bytes=status.st_size)
    except Exception as error:  # for damaged files the decoders raise almost anything
        return ImageFacts("unreadable", _message(error), num_bytes=status.st_size)


def _num_frames(image: Image.Image) -> int:
    if image.format == "MPO":  # a photo and its preview
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged; only the first is used
        return 1


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


def _with_pixels(facts: ImageFacts, image: Image.Image) -> ImageFacts:
    try:
        image.draft("RGB", (8 * THUMBNAIL, 8 * THUMBNAIL))  # JPEG files are decoded at a fraction of their size: faster
        image.load()
        orientation = exif_orientation(image)  # in a PNG file it may come after the pixels
        limits: Any = to_rgb(image).getextrema()
        if image.mode.startswith(("I", "F")):
            gray = np.asarray(image, np.float64)
            image = Image.fromarray(((gray - gray.min()) / (np.ptp(gray) or 1) * 255).astype(np.uint8))
        rgb = image.convert("RGB")
    except Exception as error:
        return facts._replace(problem="truncated", detail=_message(error))
    transparent = facts.transparent
    if transparent:
        alpha: Any = image.convert("RGBA").getchannel("A").getextrema()
        transparent = alpha[0] < 255
    levels = max(high for _, high in limits) - min(low for low, _ in limits)
    shown: Any = rgb.getextrema()
    constant = all(low == high for low, high in shown)
    thumbnail = np.asarray(rgb.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return facts._replace(
        orientation=orientation, transparent=transparent, constant=constant, levels=levels, thumbnail=thumbnail
    )


def read_all_facts(split: Split, images: NDArray[np.int64], pixels: bool, progress: Progress) -> list[ImageFacts]:
    """The facts of the image files at these indices, read with a thread per core.

    PIL and the file system leave Python free meanwhile.
    """
    file = split.file
    sizes = zip(file.widths[images].tolist(), file.heights[images].tolist(), strict=True)
    paths = [split.image_path(image) for image in images.tolist()]
    with warnings.catch_warnings(), ThreadPoolExecutor(available_cores()) as pool:
        warnings.simplefilter("ignore")  # PIL's, about large images and damaged tags
        return list(progress(pool.map(read_facts, paths, sizes, repeat(pixels)), len(paths)))


def check_files(split: Split, images: NDArray[np.int64], facts: list[ImageFacts]) -> list[Finding]:
    """The findings about single files. `images` are their indices in the file, `facts` in the same order."""
    found: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for image, fact in zip(images.tolist(), facts, strict=True):
        for code, detail in _codes(fact, int(split.file.widths[image]), int(split.file.heights[image])):
            found[code].append((image, detail))
    names: dict[Path, dict[str, str]] = {}
    for place, (image, detail) in enumerate(found["image-missing"][:MAX_EXAMPLES]):
        found["image-missing"][place] = image, _other_case(split.image_path(image), names) or detail
    return [
        finding
        for code, places in found.items()
        for finding in image_finding(code, split, [i for i, _ in places], [detail for _, detail in places])
    ]


def _codes(fact: ImageFacts, width: int, height: int) -> Iterator[tuple[str, str]]:
    """(code, detail) of each defect of a file whose image has `width` x `height` pixels in the JSON."""
    if fact.problem:
        yield f"image-{fact.problem}", fact.detail
        return
    stored, given = (fact.width, fact.height), (width, height)
    upright = stored[::-1] if fact.orientation in SWAPS_SIDES else stored
    sizes = f"{width} x {height} in the JSON, {fact.width} x {fact.height} in the file"
    if given not in (stored, upright):
        yield ("image-size-swapped" if given == stored[::-1] else "image-size-differs"), sizes
    if fact.orientation != 1:
        yield "image-exif-rotation", f"orientation {fact.orientation}, {sizes}"
    if fact.mode == "CMYK":
        yield "image-cmyk", ""
    if fact.mode.startswith(("I", "F")):
        faint = fact.levels < FAINT and not fact.constant
        yield ("image-faint", f"{fact.levels} levels") if faint else ("image-16-bit", f"mode {fact.mode}")
    if fact.transparent:
        yield "image-alpha", f"mode {fact.mode}"
    if fact.frames > 1:
        yield "image-animated", f"{fact.frames} frames"
    if fact.constant:
        yield "image-constant", ""


def _other_case(path: Path, names: dict[Path, dict[str, str]]) -> str:
    """Why a file may be missing: another case, backslashes, no folder; empty otherwise.

    `names`: of the files of each folder, by their lower case. Folders are listed once and added here.
    """
    if "\\" in path.name:
        return "the name has \\, expected /"
    try:
        if path.parent not in names:
            names[path.parent] = {file.name.casefold(): file.name for file in sorted(path.parent.iterdir())}
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no folder {path.parent}"
    except OSError:
        return ""
    same = names[path.parent].get(path.name.casefold())
    return f"the folder has {same}" if same else ""


def check_copies(train: tuple[Split, list[ImageFacts]], val: tuple[Split, list[ImageFacts]]) -> list[Finding]:
    """Files with equal bytes, in a split and in both, and validation images that resemble a training image.

    Only files of equal length are read for it. `ImageFacts` are those of all images of the file, in its order.
    """
    by_length: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
    splits = {"train": train, "val": val}
    for name, (_, facts) in splits.items():
        for image, fact in enumerate(facts):
            if fact.problem not in ("missing", "unreadable", "unused"):
                by_length[fact.num_bytes].append((name, image))
    candidates = [files for files in by_length.values() if len(files) > 1]
    for whole in (False, True):  # the ends of most files differ, so few are read as a whole
        by_bytes: defaultdict[tuple[int, bytes], list[tuple[str, int]]] = defaultdict(list)
        for group, files in enumerate(candidates):
            for name, image in files:
                by_bytes[group, _hash(splits[name][0].image_path(image), whole)].append((name, image))
        candidates = [files for files in by_bytes.values() if len(files) > 1]
    repeated: dict[str, list[tuple[int, str]]] = {"train": [], "val": []}
    leaked: dict[int, str] = {}
    for files in candidates:
        first = dict(reversed(files))
        for name, image in files:
            other = splits[name][0].image_text(first[name])
            different_file = splits[name][0].image_path(image) != splits[name][0].image_path(first[name])
            if image != first[name] and different_file:  # one file with two ids is another finding
                repeated[name].append((image, f"as {other}"))
            if name == "val" and "train" in first and not val[1][image].constant:  # blank tiles are equal
                leaked[image] = f"as {train[0].image_text(first['train'])} of the training"
    similar = {image: text for image, text in _similar_images(train, val).items() if image not in leaked}
    return [
        *(
            finding
            for name, places in repeated.items()
            for finding in image_finding(
                "image-bytes-repeated", splits[name][0], [i for i, _ in places], [text for _, text in places]
            )
        ),
        *image_finding("image-bytes-in-both-splits", val[0], list(leaked), list(leaked.values())),
        *image_finding("image-near-duplicate", val[0], list(similar), list(similar.values())),
    ]


def _hash(path: Path, whole: bool) -> bytes:
    """Of a file, or of its first and last ENDS bytes. A file that is gone meanwhile equals no other."""
    try:
        with path.open("rb") as file:
            if whole:
                return hashlib.file_digest(file, "sha256").digest()
            start = file.read(ENDS)
            file.seek(-min(ENDS, path.stat().st_size), os.SEEK_END)
            return hashlib.sha256(start + file.read()).digest()
    except OSError:
        return str(path).encode()


def _similar_images(train: tuple[Split, list[ImageFacts]], val: tuple[Split, list[ImageFacts]]) -> dict[int, str]:
    """Validation images whose thumbnail correlates with that of a training image, by their index."""
    train_images, train_pixels = _thumbnails(train[1])
    val_images, val_pixels = _thumbnails(val[1])
    # Images of one fixed scene resemble each other; what differs from the mean decides.
    mean = train_pixels.mean(axis=0) if len(train_images) >= MIN_FOR_MEAN else 0
    train_vectors, val_vectors = _unit_vectors(train_pixels - mean), _unit_vectors(val_pixels - mean)
    similar: dict[int, str] = {}
    for start in range(0, len(val_images) if len(train_images) else 0, 256):
        correlations = val_vectors[start : start + 256] @ train_vectors.T
        best = correlations.argmax(axis=1)
        for row, column in enumerate(best):
            if (value := correlations[row, column]) >= SIMILAR:
                other = train[0].image_text(train_images[column])
                similar[val_images[start + row]] = f"like {other} of the training, correlation {value:.3f}"
    return similar


def _thumbnails(facts: list[ImageFacts]) -> tuple[list[int], NDArray[np.float32]]:
    """Indices of the images with contrast, and their thumbnails, (n, THUMBNAIL^2)."""
    images = [i for i, fact in enumerate(facts) if fact.thumbnail is not None and np.ptp(fact.thumbnail) > 0]
    pixels = [np.ravel(facts[i].thumbnail).astype(np.float32) for i in images]  # type: ignore[arg-type]
    return images, np.array(pixels, np.float32).reshape(len(images), THUMBNAIL**2)


def _unit_vectors(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row with mean 0 and norm 1."""
    vectors = pixels - pixels.mean(axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6))
