"""Reads a COCO-format JSON file into columns: one numpy array for each field, no Python object for a box.

The classes `_Image`, `_Annotation` and `_Category` are the schema, the only one in the program. Other fields of the
file, such as `segmentation`, are skipped without being stored.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # pixels
WHOLE = {"id", "image_id", "category_id", "width", "height", "iscrowd"}  # fields that are whole numbers
MAX_ERRORS = 10  # that a message lists
PART = 20_000  # entries that are decoded at a time


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
    iscrowd: bool | Annotated[int, Meta(ge=0, le=1)] | None = 0
    area: float | None = None


class _Category(Struct, gc=False):
    id: Int64
    name: Annotated[str, Meta(min_length=1)]


class _File(Struct):
    """The lists, with their entries as the bytes of the file. They are decoded in parts, which saves memory."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


Entry = TypeVar("Entry", _Image, _Annotation, _Category)


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

    @property
    def distinct_names(self) -> list[str]:
        """Of the K categories; see `distinct_names`."""
        return distinct_names(list(zip(self.category_ids, self.names, strict=True)))


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
        return _columns(path, _decode_lists(path, content))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {_syntax_error(content, str(error))}") from None
    except RecursionError:
        raise DataError(f"{path}: lists or objects are nested too deeply for COCO detection data") from None
    finally:
        if collecting:
            gc.enable()


def _decode_lists(path: Path, content: bytes) -> _File:
    try:
        return msgspec.json.decode(content, type=_File)
    except msgspec.ValidationError as error:
        _raise(path, [_explain("", str(error), msgspec.json.decode(content))])


def _columns(path: Path, file: _File) -> Annotations:
    errors: list[str] = []
    images = [image for part in _decode("images", file.images, _Image, errors) for image in part]
    in_file = [category for part in _decode("categories", file.categories, _Category, errors) for category in part]
    parts = [_annotation_columns(part) for part in _decode("annotations", file.annotations, _Annotation, errors)]
    if errors:
        _raise(path, errors)
    ids, has_id, of_image, of_category, boxes, areas, crowd = map(np.concatenate, zip(*parts, strict=True))
    categories = sorted(in_file, key=lambda category: category.id)
    image_ids = np.fromiter((image.id for image in images), np.int64, len(images))
    category_ids = np.array([category.id for category in categories], np.int64)
    index, known_image = find_ids(of_image, image_ids)
    label, known_category = find_ids(of_category, category_ids)
    errors = [
        *_repeated("images", images),
        *_repeated("categories", in_file),
        *(() if images or not len(ids) else ["images: the list is empty, expected the images of the annotations"]),
        *(() if categories else ["categories: the list is empty, expected at least one category"]),
        *(
            f"images[{i}].file_name: given {image.file_name!r}, expected the path of a file in the image folder"
            for i, image in enumerate(images)
            if _leaves_the_folder(image.file_name)
        ),
        *(
            f"annotations[{i}].image_id: given {of_image[i]}, which is not the id of an image"
            for i in np.flatnonzero(~known_image)
            if images
        ),
        *(
            f"annotations[{i}].category_id: given {of_category[i]}, which is not the id of a category; "
            f"known: {_first(category_ids.tolist())}"
            for i in np.flatnonzero(~known_category)
            if categories
        ),
    ]
    if errors:
        _raise(path, errors)
    with np.errstate(over="ignore", invalid="ignore"):  # a box of 1e200 pixels
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    return Annotations(
        path,
        image_ids,
        np.array([image.file_name for image in images], np.dtypes.StringDType()),
        np.fromiter((image.width for image in images), np.int32, len(images)),
        np.fromiter((image.height for image in images), np.int32, len(images)),
        np.where(has_id, ids, np.arange(1, len(ids) + 1)),
        int((~has_id).sum()),
        index,
        label.astype(np.int32),
        boxes,
        areas,
        crowd,
        category_ids.tolist(),
        [category.name for category in categories],
    )


def _decode(name: str, entries: list[msgspec.Raw], schema: type[Entry], errors: list[str]) -> Iterator[list[Entry]]:
    """The decoded entries in parts, at least one part. Appends the first error of each broken entry to `errors`."""
    for start in range(0, max(len(entries), 1), PART):
        part = entries[start : start + PART]
        try:
            yield msgspec.json.decode(b"[" + b",".join(part) + b"]", type=list[schema])  # type: ignore[valid-type]
        except msgspec.DecodeError:
            decoded = [_decode_entry(f"{name}[{i}]", entry, schema, errors) for i, entry in enumerate(part, start)]
            yield [entry for entry in decoded if entry is not None]


def _decode_entry(place: str, entry: msgspec.Raw, schema: type[Entry], errors: list[str]) -> Entry | None:
    """One entry in a part with a broken one. Whole numbers may be written as 1.0 here, as pandas does."""
    try:
        fields = msgspec.json.decode(entry)
    except msgspec.ValidationError as error:  # a number that no float can hold
        errors.append(f"{place}: {error}")
        return None
    try:
        return msgspec.convert(with_whole_numbers(fields), schema)
    except msgspec.ValidationError as error:
        errors.append(_explain(place, str(error), fields))
        return None


def with_whole_numbers(fields: Any) -> Any:
    """An entry of a file with its ids, sizes and flags as whole numbers where they are written as 1.0."""
    if not isinstance(fields, dict):
        return fields
    is_whole = {key for key in WHOLE & fields.keys() if isinstance(fields[key], float) and fields[key].is_integer()}
    return fields | {key: int(fields[key]) for key in is_whole} if is_whole else fields


def _annotation_columns(part: list[_Annotation]) -> tuple[NDArray[Any], ...]:
    count = len(part)
    return (
        np.fromiter((0 if entry.id is None else entry.id for entry in part), np.int64, count),
        np.fromiter((entry.id is not None for entry in part), np.bool_, count),
        np.fromiter((entry.image_id for entry in part), np.int64, count),
        np.fromiter((entry.category_id for entry in part), np.int64, count),
        np.fromiter(chain.from_iterable(entry.bbox for entry in part), np.float64, 4 * count).reshape(-1, 4),
        np.fromiter((np.nan if entry.area is None else entry.area for entry in part), np.float64, count),
        np.fromiter((bool(entry.iscrowd) for entry in part), np.bool_, count),
    )


def find_ids(values: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The index of each value in `ids`, and whether it is one of them."""
    if not len(ids):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    order = np.argsort(ids, kind="stable")
    index = order[np.searchsorted(ids[order], values).clip(max=len(ids) - 1)]
    return index, ids[index] == values


def distinct_names(categories: Sequence[tuple[int, str]]) -> list[str]:
    """The names of (id, name), with the id where several have one name, as exports of Roboflow do."""
    ids, names = [number for number, _ in categories], [name for _, name in categories]
    while len(set(names)) < len(set(ids)):  # again where "cell (id 1)" was the name of another class
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else f"{name} (id {number})" for number, name in zip(ids, names, strict=True)
        ]
    return names


def _repeated(name: str, entries: Sequence[_Image | _Category]) -> list[str]:
    first: dict[int, int] = {}
    return [
        f"{name}[{i}].id: given {entry.id}, which is already the id of {name}[{first[entry.id]}]"
        for i, entry in enumerate(entries)
        if first.setdefault(entry.id, i) != i
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


def _explain(place: str, message: str, entry: Any) -> str:
    """A message of msgspec, such as "Expected `int`, got `str` - at `$.bbox[1]`", with place and value."""
    expected, _, path = message.partition(" - at `$")
    value, path = entry, path.rstrip("`")
    for step in path.replace("[", ".").replace("]", "").split(".")[1:]:
        value = value[int(step)] if isinstance(value, list) else value[step]
    given = msgspec.json.encode(value).decode()
    given = given if len(given) <= 60 else f"{given[:57]}..."
    return f"{f'{place}{path}'.lstrip('.') or 'top level'}: given {given}; {_plain(expected)}"


def _plain(expected: str) -> str:
    names = {
        "`int`": "a whole number",
        "`float`": "a number",
        "`str`": "text in quotes",
        "`bool | int | null`": "0 or 1",
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
