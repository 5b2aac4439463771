"""Reads a COCO-format JSON file into columns: one numpy array for each field, no Python object for a box.

The classes `_Image`, `_Annotation` and `_Category` are the schema, the only one in the program. Other fields of the
file, such as `segmentation`, are skipped without being stored.
"""

from __future__ import annotations

import gc
import re
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # pixels
MAX_ERRORS = 10  # that a message lists


class DataError(ValueError):
    """Annotations or an image file that cannot be used. The message names the file and, where there is one, the id."""


# gc=False: a cycle is impossible, and the garbage collector would visit every box again and again.
class _Image(Struct, gc=False):
    id: Int64
    file_name: Annotated[str, Meta(min_length=1)]
    width: Side
    height: Side


class _Annotation(Struct, gc=False):
    image_id: Int64
    category_id: Int64
    bbox: tuple[float, float, float, float]
    id: Int64 | None = None
    iscrowd: bool | Annotated[int, Meta(ge=0, le=1)] = 0
    area: float | None = None


class _Category(Struct, gc=False):
    id: Int64
    name: Annotated[str, Meta(min_length=1)]


class _File(Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _RawFile(Struct):
    """The same with undecoded entries, to find every broken one."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


PARTS = {"images": _Image, "annotations": _Annotation, "categories": _Category}


class Annotations(NamedTuple):
    """The contents of a file: B images and T annotations in its order, K categories in the order of their ids."""

    path: Path
    image_ids: NDArray[np.int64]  # (B,)
    file_names: NDArray[Any]  # (B,) numpy strings
    widths: NDArray[np.int32]  # (B,) pixels
    heights: NDArray[np.int32]  # (B,) pixels
    ids: NDArray[np.int64]  # (T,); the position in the file, from 1, where it has no id
    without_id: int  # number of annotations without `id`
    images: NDArray[np.int64]  # (T,) index of the image in the columns above
    labels: NDArray[np.int32]  # (T,) index of the category
    boxes: NDArray[np.float64]  # (T, 4) xywh in pixels, as in the file
    areas: NDArray[np.float64]  # (T,) pixels; that of the box where the file has none
    crowd: NDArray[np.bool_]  # (T,) `iscrowd`
    category_ids: list[int]
    names: list[str]


def read_annotations(path: Path) -> Annotations:
    """Read and check a COCO JSON file.

    Raises:
        DataError: the file is missing, not JSON, or not COCO detection data; two images or two categories have the same
            id; an annotation refers to an unknown image or category; a `file_name` leads out of its folder. The message
            lists the first ten errors, each with its place in the file, the value and what is expected.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some Windows programs
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such annotation file (see data/README.md for how to make or fetch each data set)"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects and no garbage: collections would take half of the time
    try:
        file = msgspec.json.decode(content, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        _refuse(path, content)
    finally:
        if collecting:
            gc.enable()
    del content  # as large as all that was read from it
    return _columns(path, file)


def _columns(path: Path, file: _File) -> Annotations:
    images, annotations = file.images, file.annotations
    categories = sorted(file.categories, key=lambda category: category.id)
    image_ids = np.fromiter((image.id for image in images), np.int64, len(images))
    category_ids = np.array([category.id for category in categories], np.int64)
    count = len(annotations)
    of_image = np.fromiter((annotation.image_id for annotation in annotations), np.int64, count)
    of_category = np.fromiter((annotation.category_id for annotation in annotations), np.int64, count)
    boxes = np.fromiter(chain.from_iterable(a.bbox for a in annotations), np.float64, 4 * count).reshape(-1, 4)
    areas = np.fromiter((np.nan if a.area is None else a.area for a in annotations), np.float64, count)
    index, known_image = _find(of_image, image_ids)
    label, known_category = _find(of_category, category_ids)
    errors = [
        *_repeated("images", [image.id for image in images]),
        *_repeated("categories", [category.id for category in file.categories]),
        *(() if categories else ["categories: the list is empty, expected at least one category"]),
        *(
            f"images[{i}].file_name: given {images[i].file_name!r}, expected the path of a file in the image folder"
            for i, image in enumerate(images)
            if _leaves_the_folder(image.file_name)
        ),
        *(
            f"annotations[{i}].image_id: given {of_image[i]}, which is not the id of an image"
            for i in np.flatnonzero(~known_image)
        ),
        *(
            f"annotations[{i}].category_id: given {of_category[i]}, which is not the id of a category; "
            f"known: {_first(category_ids.tolist())}"
            for i in np.flatnonzero(~known_category)
        ),
    ]
    if errors:
        _raise(path, errors)
    with np.errstate(over="ignore"):  # a box of 1e200 pixels
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    return Annotations(
        path,
        image_ids,
        np.array([image.file_name for image in images], np.dtypes.StringDType()),
        np.fromiter((image.width for image in images), np.int32, len(images)),
        np.fromiter((image.height for image in images), np.int32, len(images)),
        np.fromiter((i if a.id is None else a.id for i, a in enumerate(annotations, 1)), np.int64, count),
        sum(annotation.id is None for annotation in annotations),
        index,
        label.astype(np.int32),
        boxes,
        areas,
        np.fromiter((bool(annotation.iscrowd) for annotation in annotations), np.bool_, count),
        category_ids.tolist(),
        [category.name for category in categories],
    )


def _find(values: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The index of each value in `ids`, and whether it is one of them."""
    if not len(ids):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    order = np.argsort(ids, kind="stable")
    index = order[np.searchsorted(ids[order], values).clip(max=len(ids) - 1)]
    return index, ids[index] == values


def _repeated(part: str, ids: list[int]) -> list[str]:
    first: dict[int, int] = {}
    return [
        f"{part}[{i}].id: given {value}, which is already the id of {part}[{first[value]}]"
        for i, value in enumerate(ids)
        if first.setdefault(value, i) != i
    ]


def _leaves_the_folder(name: str) -> bool:
    return name[0] == "/" or "\0" in name or (".." in name and ".." in name.split("/"))


def _syntax_error(content: bytes, message: str) -> str:
    """A message of msgspec, such as "JSON is malformed: invalid character (byte 17)", with the place in the file."""
    if not content.strip():
        return "the file is empty"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "the text is UTF-16; save it as UTF-8"
    found = re.search(r"^(?:JSON is malformed: )?(.*) \(byte (\d+)\)$", message)
    if found is None:
        return message
    position = int(found[2])
    line, column = content.count(b"\n", 0, position) + 1, position - content.rfind(b"\n", 0, position)
    around = content[position : position + 20].decode(errors="replace")
    advice = "; JSON has no NaN and no infinity" if re.match(r"-?(NaN|Inf|nan|inf)", around) else ""
    return f"{found[1]} in line {line}, column {column}, at {around!r}{advice}"


def _refuse(path: Path, content: bytes) -> NoReturn:
    """Raise the DataError of a file that cannot be decoded."""
    try:
        errors = _schema_errors(content)
    except RecursionError:
        errors = ["lists or objects are nested too deeply for COCO detection data"]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        errors = [f"not JSON: {_syntax_error(content, str(error))}"]
    _raise(path, errors)


def _schema_errors(content: bytes) -> list[str]:
    """The first error of each entry that does not fit the schema, or the one of the lists themselves."""
    try:
        raw = msgspec.json.decode(content, type=_RawFile)
    except msgspec.ValidationError as error:
        return [_explain("", str(error), msgspec.json.decode(content))]
    errors = []
    for part, schema in PARTS.items():
        for i, entry in enumerate(getattr(raw, part)):
            try:
                msgspec.json.decode(entry, type=schema)
            except msgspec.ValidationError as error:
                errors.append(_explain(f"{part}[{i}]", str(error), msgspec.json.decode(entry)))
    return errors


def _explain(place: str, message: str, entry: Any) -> str:
    """A message of msgspec, such as "Expected `int`, got `str` - at `$.bbox[1]`", with place and value."""
    expected, _, path = message.partition(" - at `$")
    value, path = entry, path.rstrip("`")
    for step in path.replace("[", ".").replace("]", "").split(".")[1:]:
        value = value[int(step)] if isinstance(value, list) else value[step]
    given = msgspec.json.encode(value).decode()
    given = given if len(given) <= 60 else f"{given[:57]}..."
    advice = " without a decimal point" if isinstance(value, float) and value.is_integer() else ""
    return f"{f'{place}{path}'.lstrip('.') or 'top level'}: given {given}; {_plain(expected)}{advice}"


def _plain(expected: str) -> str:
    names = {
        "`int`": "a whole number",
        "`float`": "a number",
        "`str`": "text in quotes",
        "`bool | int`": "0 or 1",
        "`int | null`": "a whole number",
        "`float | null`": "a number",
        "`array`": "a list [...]",
        "`object`": "an object {...}",
        "`null`": "null",
    }
    for code, name in names.items():
        expected = expected.replace(code, name)
    return expected.partition(", got")[0].replace("Object missing required field", "missing key").lower()


def _raise(path: Path, errors: list[str]) -> NoReturn:
    if len(errors) == 1:
        raise DataError(f"{path}: {errors[0]}")
    listed = f", the first {MAX_ERRORS}" if len(errors) > MAX_ERRORS else ""
    raise DataError("\n  ".join([f"{path}: {len(errors)} errors{listed}:", *errors[:MAX_ERRORS]]))


def _first(values: list[int]) -> str:
    return ", ".join(map(str, values[:MAX_ERRORS])) + (", ..." if len(values) > MAX_ERRORS else "")
