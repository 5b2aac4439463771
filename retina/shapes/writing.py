"""Writes the generated data set: scenes of scene.py as JPEG files, annotations in COCO format, and a manifest.

Input: the settings. Output: a folder. Its bytes do not depend on the number of processes. The manifest has the settings
and the SHA-256 of the files, so its own hash identifies the data set, pixels included.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from pydantic import ValidationError
from tqdm import tqdm

from retina.atomic_files import file_lock, write_text
from retina.config import SHAPES_MANIFEST as MANIFEST
from retina.config import Data
from retina.config_file import ConfigError
from retina.cores import available_cores
from retina.shapes.layout import CATEGORIES
from retina.shapes.scene import GENERATOR_VERSION, draw_scene
from retina.shapes.settings import MAX_IMAGES, ShapesSettings, load_settings

VAL_START = MAX_IMAGES  # index of the first val scene; fixed, so that no scene depends on the number of images
ANNOTATIONS = {"train": "annotations/train.json", "val": "annotations/val.json"}  # by split, in the folder
DESCRIPTION = "shapes, a generated data set"
_JPEG_QUALITY = 92


def write_shapes(root: Path, settings: ShapesSettings, processes: int | None = None) -> bool:
    """Write `root`/{train,val}/000000.jpg ..., `root`/annotations/{train,val}.json in COCO format, and a manifest.

    A scene depends on the settings and its index alone, not on the number of images. The manifest is written last, so
    if it exists, the folder is complete, and a second call with the same settings does nothing. Of several processes
    that call this at the same time, one writes and the others wait.

    Args:
        root: the folder; it is created if it does not exist.
        settings: of the data set.
        processes: number of processes that draw; None: one for each core.

    Returns:
        Whether something was missing.

    Raises:
        ValueError: `processes` is less than 1.
        FileExistsError: `root` was written with other settings, or has images or annotations of another origin.
    """
    processes = available_cores() if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes: given {processes}, expected at least 1")
    root = Path(root)
    if _check_existing(root, settings) and (root / MANIFEST).exists():
        return False  # without the lock, because the disk may be read-only
    lock_file = root / ".shapes.lock"  # also marks the folder of an interrupted call as ours
    has_annotations = all((root / name).exists() for name in ANNOTATIONS.values())
    has_images = any(any((root / split).glob("*")) for split in ANNOTATIONS)
    if has_images and not has_annotations and not lock_file.exists():
        raise FileExistsError(f"{root}: has a folder train or val with files in it; give another folder")
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(lock_file):
        if not _check_existing(root, settings):
            print(f"{root}: writing {settings.train} + {settings.val} images", flush=True)
            _write_splits(root, settings, processes)
        if not (root / MANIFEST).exists():
            counts = {"train": settings.train, "val": settings.val}
            digests = {split: _digest(root, split, count) for split, count in counts.items()}
            manifest = {"version": GENERATOR_VERSION, "settings": settings.model_dump(mode="json"), "sha256": digests}
            write_text(root / MANIFEST, json.dumps(manifest, indent=1))
    return True


def make_missing_shapes(data: Data) -> bool:
    """Write the data set that `data.shapes` describes where it is missing; True if something was written.

    Raises ConfigError for a wrong settings file, or paths that are not those of a generated data set; FileExistsError
    as `write_shapes`.
    """
    if data.shapes is None or data.shapes_root is None:
        return False
    root = data.shapes_root
    expected = {f"{split}_images": root / split for split in ANNOTATIONS}
    expected |= {f"{split}_annotations": root / name for split, name in ANNOTATIONS.items()}
    for name, path in expected.items():
        if Path(getattr(data, name)) != path:
            raise ConfigError(
                f"data.{name}: given {getattr(data, name)}, but data.shapes={data.shapes} makes {path}; "
                "for data of your own give data.shapes=null"
            )
    settings = load_settings(data.shapes)
    try:
        return write_shapes(root, settings)
    except FileExistsError as error:
        raise FileExistsError(f"{error}; data.shapes=null uses what is there") from None


def _check_existing(root: Path, settings: ShapesSettings) -> bool:
    """Whether both annotation files are there; FileExistsError if one has other settings or another origin."""
    requested = {"version": GENERATOR_VERSION, **settings.model_dump(mode="json")}
    paths = [root / name for name in ANNOTATIONS.values()]
    for path in filter(Path.exists, paths):
        try:
            info = json.loads(path.read_text(encoding="utf-8"))["info"]
            if info["description"] != DESCRIPTION:
                raise ValueError("another origin")
            known = {key: info[key] for key in ShapesSettings.model_fields if key in info}
            existing = {"version": info["version"], **ShapesSettings.model_validate(known).model_dump(mode="json")}
        except (ValueError, KeyError, TypeError, ValidationError):
            raise FileExistsError(f"{path} was not written by this generator; give another folder") from None
        differing = [
            f"{key} is {existing[key]!r}, requested {value!r}"
            for key, value in requested.items()
            if existing[key] != value
        ]
        if differing:
            raise FileExistsError(
                f"{path} was written with other settings ({'; '.join(differing)}); "
                f"give another folder, or delete {root}"
            )
    return all(path.exists() for path in paths)


def _write_splits(root: Path, settings: ShapesSettings, processes: int) -> None:
    splits: dict[str, list[list[dict[str, Any]]]] = {}
    with contextlib.ExitStack() as stack:
        map_scenes: Callable[..., Iterable[Any]] = map
        if processes > 1:  # spawn, because a fork copies locks that other threads hold; one OpenCV thread in each
            pool = multiprocessing.get_context("spawn").Pool(processes, cv2.setNumThreads, (0,))
            map_scenes = partial(stack.enter_context(pool).imap, chunksize=8)
        for split, count, start in (("train", settings.train, 0), ("val", settings.val, VAL_START)):
            (root / split).mkdir(parents=True, exist_ok=True)
            scenes = [(root / split / f"{i:06d}.jpg", settings, start + i) for i in range(count)]
            splits[split] = list(_progress(map_scenes(_write_scene, scenes), count, split))
    for split, name in ANNOTATIONS.items():
        (root / name).parent.mkdir(exist_ok=True)
        write_text(root / name, json.dumps(_coco_dict(splits[split], settings)))


def _write_scene(arguments: tuple[Path, ShapesSettings, int]) -> list[dict[str, Any]]:
    path, settings, index = arguments
    image, annotations = draw_scene(settings, index)
    _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    path.write_bytes(jpeg.tobytes())
    return annotations


def _progress(scenes: Iterable[Any], total: int, split: str) -> Iterator[Any]:
    if sys.stderr.isatty():
        yield from tqdm(scenes, split, total)
        return
    for done, scene in enumerate(scenes, 1):
        yield scene
        if done == total or done % math.ceil(total / 4) == 0:
            print(f"{split}: {done} of {total} images", flush=True)


def _coco_dict(scenes: list[list[dict[str, Any]]], settings: ShapesSettings) -> dict[str, Any]:
    info = {"description": DESCRIPTION, "version": GENERATOR_VERSION}
    info |= settings.model_dump(mode="json")
    size = settings.size
    images = [
        {"id": i, "file_name": f"{i - 1:06d}.jpg", "width": size, "height": size} for i in range(1, len(scenes) + 1)
    ]
    annotations = [{"image_id": i, **annotation} for i, scene in enumerate(scenes, 1) for annotation in scene]
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)]
    categories = list(CATEGORIES[: settings.classes])
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _digest(root: Path, split: str, count: int) -> str:
    """SHA-256 over the names and the contents of the annotation file and the images of a split."""
    sha = hashlib.sha256()
    for file in [root / ANNOTATIONS[split], *(root / split / f"{i:06d}.jpg" for i in range(count))]:
        sha.update(file.name.encode())
        sha.update(hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()
