"""Finds the images, label files and class names of a YOLO data set; yolo.py describes the decisions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from retina.convert import checks
from retina.convert.checks import is_file, is_folder, shorten
from retina.file_search import files_in

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASS_FILES = ("classes.txt", "obj.names")
SPLITS = ("train", "val", "test")
SIDE_FILES = {".txt", ".cache", ".npy", ".json", ".xml", ".names"}  # beside images, and no sign of a mistake


class DataSet(NamedTuple):
    """One split of a YOLO data set."""

    folder: Path  # the folder that contains all images
    images: list[Path]
    names: list[str]  # of the classes 0, 1, ...
    keypoint_columns: int  # of a label line, after the box


class _DataFile(NamedTuple):
    """The content of a data.yaml."""

    path: Path
    base: Path  # the folder that `train`, `val` and `test` are relative to
    splits: dict[str, list[str]]
    names: list[str] | None
    number_of_classes: int | None
    keypoint_columns: int


def find_data_set(root: Path, split: str | None, categories: list[str] | None, notes: list[str]) -> DataSet:
    """Find the files of one split. The arguments and the errors are those of `convert_yolo`."""
    path = root if is_file(root) else _data_file(root)
    if path is None and not is_folder(root):
        raise FileNotFoundError(
            f"{root}: no such folder or file; expected the folder of a YOLO data set or its data.yaml"
        )
    data = None if path is None else _read_data_file(path)
    sources = [_plain_source(root, split)] if data is None else _data_sources(data, split, notes)
    problems: list[ValueError | OSError] = []
    images: dict[Path, Path] = {}  # absolute path -> path
    folders = []
    for source in sources:
        if is_folder(source):
            found = _images_in(source, notes)
            folders.append(source)
        else:
            found = _listed_images(source, source.parent if data is None else data.base, problems)
        for image in found:
            if absolute(image) in images:
                notes.append(f"repeated: {image}: used once")
            images.setdefault(absolute(image), image)
    checks.raise_together(problems, root)
    if not images:
        raise FileNotFoundError(f"{root}: no images in {checks.first_names([str(source) for source in sources])}")
    _note_labels_without_image(folders, images, notes)
    if len(sources) == 1 and folders:
        folder, paths = sources[0], list(images.values())
    else:
        folder, paths = Path(os.path.commonpath([image.parent for image in images])), list(images)
    names = _class_names(root, data, sources, categories)
    return DataSet(folder, paths, names, 0 if data is None else data.keypoint_columns)


def _data_file(root: Path) -> Path | None:
    """The data.yaml of a folder, or its only YAML file, such as coco128.yaml."""
    if not is_folder(root):
        return None
    files = sorted(path for path in root.iterdir() if path.suffix in (".yaml", ".yml") and is_file(path))
    named = [root / name for name in DATA_FILES if root / name in files]
    return named[0] if named else files[0] if len(files) == 1 else None


def absolute(path: Path) -> Path:
    """An absolute path without `..`. Unlike Path.resolve, it follows no links: the labels are beside the link."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def label_file(image: Path) -> Path:
    """Where the labels of an image are, or would be: `labels` for the last folder `images`, or beside the image."""
    beside = absolute(image).with_suffix(".txt")
    parts = beside.parts
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if not places:
        return beside
    mapped = Path(*parts[: places[-1]], "labels", *parts[places[-1] + 1 :])
    return beside if is_file(beside) and not mapped.exists() else mapped


def _plain_source(root: Path, split: str | None) -> Path:
    """The folder of images, or the list, in a folder without data.yaml."""
    if split is None:
        source = root / "images" if is_folder(root / "images") else root
        if not any(_is_image(path) for path in source.iterdir()):
            known = ", ".join(_plain_splits(root)) or "none"
            raise FileNotFoundError(
                f"{source}: no images directly in this folder; give one of its splits with --split; found: {known}"
            )
        return source
    folders = [root / "images" / split, root / split / "images"]
    present = [folder for folder in folders if is_folder(folder)]
    if len(present) == 2:
        raise ValueError(f"{root}: images of split {shorten(split)} are in {folders[0]} and {folders[1]}; remove one")
    present += [folder for folder in [root / split] if is_folder(folder)]
    present += [path for path in [root / f"{split}.txt"] if is_file(path)]
    if not present:
        known = ", ".join(_plain_splits(root)) or "none"
        raise FileNotFoundError(
            f"{root}: no split {shorten(split)}: looked for data.yaml, {folders[0]}/, {folders[1]}/, {root / split}/ "
            f"and {root / split}.txt; found: {known}"
        )
    return present[0]


def _plain_splits(root: Path) -> list[str]:
    images = root / "images"
    inner = [path.name for path in images.iterdir() if path.is_dir()] if images.is_dir() else []
    outer = [path.name for path in root.iterdir() if (path / "images").is_dir()]
    return sorted({*inner, *outer})


def _read_data_file(path: Path) -> _DataFile:
    try:
        # BaseLoader builds only text, lists and dicts: it runs no code, and a class called `no` or `on` keeps its name.
        tree = yaml.load(checks.read_bytes(path), Loader=yaml.BaseLoader)
    except RecursionError:
        raise ValueError(f"{path}: not readable as YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise ValueError(f"{path}: not readable as YAML: {reason[:300]}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected the keys train, val and names, given {_kind(tree)}")
    tree = {key: value for key, value in tree.items() if value not in ("", "~", "null")}
    home = tree.get("path", ".")
    if not isinstance(home, str):
        raise ValueError(f"{path}: path: expected a folder, given {_kind(home)}")
    base = path.parent / _with_slashes(home)
    base = base if is_folder(base) else path.parent
    splits = {split: _texts(tree[split], f"{path}: {split}") for split in SPLITS if split in tree}
    if not splits:
        raise ValueError(
            f"{path}: expected one of the keys {', '.join(SPLITS)} with a folder of images or a list; none found"
        )
    names = _names(tree["names"], path) if "names" in tree else None
    count = _count(tree["nc"], f"{path}: nc") if "nc" in tree else None
    keypoints = 0
    if "kpt_shape" in tree:
        shape = [_count(text, f"{path}: kpt_shape") for text in _texts(tree["kpt_shape"], f"{path}: kpt_shape")]
        if len(shape) != 2 or shape[1] not in (2, 3):
            raise ValueError(
                f"{path}: kpt_shape: expected [number of keypoints, 2 or 3], given {shape[: checks.LISTED]}"
            )
        keypoints = shape[0] * shape[1]
    return _DataFile(path, base, splits, names, count, keypoints)


def _names(value: Any, path: Path) -> list[str]:
    """The names of the classes 0, 1, ... from a list, or from a dict with these numbers as keys."""
    if isinstance(value, dict):
        numbers = [_count(key, f"{path}: names") for key in value]
        if sorted(numbers) != list(range(len(numbers))):
            raise ValueError(
                f"{path}: names: expected the class numbers 0 to {len(numbers) - 1}, each once, given "
                f"{checks.first_names([str(number) for number in numbers])}"
            )
        value = [name for _, name in sorted(zip(numbers, value.values(), strict=True), key=lambda pair: pair[0])]
    elif not isinstance(value, list):
        raise ValueError(
            f"{path}: names: expected a list of class names, or a dict of numbers and names, given {_kind(value)}"
        )
    return [name.strip() for name in _texts(value, f"{path}: names")]


def _texts(value: Any, where: str) -> list[str]:
    """A text or a list of texts, as a list."""
    values = value if isinstance(value, list) else [value]
    for position, item in enumerate(values, start=1):
        if not isinstance(item, str):
            raise ValueError(f"{where}: entry {position}: expected text, given {_kind(item)}")
    return values


def _count(text: Any, where: str) -> int:
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10):
        given = shorten(text) if isinstance(text, str) else _kind(text)
        raise ValueError(f"{where}: expected a whole number from 0, given {given}")
    return int(text)


def _kind(value: Any) -> str:
    """What a YAML value is, without its content: aliases can make that huge."""
    if value is None:
        return "nothing"
    return "a list" if isinstance(value, list) else "a dict" if isinstance(value, dict) else shorten(str(value))


def _with_slashes(path: str) -> str:
    """A path as Windows writes it, for this machine."""
    return path.replace("\\", "/")


def _data_sources(data: _DataFile, split: str | None, notes: list[str]) -> list[Path]:
    """The folders of images and the lists of a split."""
    known = ", ".join(data.splits)
    if split is None:
        raise ValueError(f"{data.path}: give one of its splits with --split: {known}")
    if split not in data.splits:
        raise FileNotFoundError(f"{data.path}: no split {shorten(split)}; available splits: {known}")
    sources = []
    for entry in data.splits[split]:
        text = _with_slashes(entry)
        # Exports of Roboflow say ../train/images and mean train/images beside the data.yaml.
        candidates = [data.base / text] + ([data.base / text[3:]] if text.startswith("../") else [])
        candidates = [Path(os.path.normpath(path)) for path in candidates]
        present = [path for path in candidates if is_file(path) or is_folder(path)]
        if not present:
            looked = " and ".join(checks.brief(path) for path in candidates)
            raise FileNotFoundError(f"{data.path}: {split}: {shorten(entry)} does not exist; looked for {looked}")
        if len(present) == 2:
            notes.append(f"ambiguous: {data.path}: {split}: {shorten(entry)}: used {present[0]}, not {present[1]}")
        sources.append(present[0])
    return sources


def _is_image(path: Path) -> bool:
    readable = Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN
    return readable and not path.name.startswith(".")  # "._name.jpg": macOS adds these to archives


def _images_in(folder: Path, notes: list[str]) -> list[Path]:
    """The images in a folder and the folders in it, sorted."""
    files = files_in(folder)
    others = [path.name for path in files if not _is_image(path) and path.suffix.lower() not in SIDE_FILES]
    if others:
        notes.append(
            f"ignored: {len(others)} files in {folder} that are not images that PIL reads: {checks.first_names(others)}"
        )
    return [path for path in files if _is_image(path)]


def _listed_images(list_file: Path, base: Path, problems: list[ValueError | OSError]) -> list[Path]:
    """The images of a list, one path a line, relative to the list or to `base`. CVAT writes data/ before each."""
    images = []
    for number, line in enumerate(checks.read_lines(list_file), start=1):
        if not line:
            continue
        text = _with_slashes(line)
        candidates = [list_file.parent / text, base / text, list_file.parent / text.removeprefix("data/")]
        candidates = [Path(os.path.normpath(path)) for path in candidates]
        image = next((path for path in candidates if is_file(path)), None)
        if image is None:
            looked = " and ".join(dict.fromkeys(checks.brief(path) for path in candidates))
            problems.append(FileNotFoundError(f"{list_file}, line {number}: no image; looked for {looked}"))
        else:
            images.append(image)
    return images


def _note_labels_without_image(folders: list[Path], images: dict[Path, Path], notes: list[str]) -> None:
    """A list of images may leave out images, so only folders are compared with their labels."""
    used = {label_file(image) for image in images}
    unused: list[str] = []
    for folder in folders:
        place = label_file(folder / "any").parent
        files = files_in(place) if is_folder(place) else []
        labels = [path for path in files if path.suffix == ".txt" and path.name not in CLASS_FILES]
        unused += [str(path) for path in labels if path not in used]
    if unused:
        notes.append(f"unused: {len(unused)} label files without an image: {checks.first_names(unused)}")


def _class_names(root: Path, data: _DataFile | None, sources: list[Path], categories: list[str] | None) -> list[str]:
    """The class names from data.yaml, or else from a file of names, or else those given with --categories."""
    origin: Path | str = "--categories"
    names = None if data is None else data.names
    if data is not None and names is not None:
        origin = data.path
    else:
        home = root if is_folder(root) else root.parent
        places = [home, home / "labels", *(label_file(source / "any").parent for source in sources), *sources]
        files = [place / name for place in places for name in CLASS_FILES]
        origin = next((path for path in files if is_file(path)), origin)
        if isinstance(origin, Path):
            names = [line for line in checks.read_lines(origin) if line]
        elif categories is None:
            raise FileNotFoundError(
                f"{root}: no class names: looked for names in data.yaml, and for {' and '.join(CLASS_FILES)} in the "
                "folders of images and labels; give --categories NAME ..., in the order of the class numbers"
            )
    if names is not None and categories is not None and names != categories:
        raise ValueError(
            f"{origin}: has the class names {checks.first_names(names)}; leave out --categories, which differ"
        )
    names = categories or [] if names is None else names
    checks.check_names(names, origin)
    if data is not None and data.number_of_classes not in (None, len(names)):
        raise ValueError(
            f"{data.path}: nc is {data.number_of_classes}, but {origin} has {len(names)} class names; correct one"
        )
    return names
