"""Writes the generated data set: scenes of scene.py as JPEG files, annotations in COCO format, and a manifest.

Input: the settings. Output: a folder. Its bytes do not depend on the number of processes. The manifest has the settings
and the SHA-256 of the files, so its own hash identifies the data set, pixels included.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from pydantic import ValidationError
from tqdm import tqdm

from retina.atomic_files import write_text
from retina.config import Data
from retina.shapes.layout import CATEGORIES
from retina.shapes.scene import GENERATOR_VERSION, draw_scene
from retina.shapes.settings import MAX_IMAGES, ShapesSettings, load_settings

VAL_START = MAX_IMAGES  # index of the first val scene; fixed, so that no scene depends on the number of images
MANIFEST = "manifest.json"
_JPEG_QUALITY = 92


def write_shapes(root: Path, settings: ShapesSettings, processes: int | None = None) -> dict[str, Path]:
    """Write `root`/{train,val}/000000.jpg ..., `root`/annotations/{train,val}.json in COCO format, and a manifest.

    A scene depends on the settings and its index alone, not on the number of images. The manifest is written last, so
    if it exists, the folder is complete, and a second call with the same settings does nothing.

    Args:
        root: the folder; it is created if it does not exist.
        settings: of the data set.
        processes: number of processes that draw; None: one for each core.

    Returns:
        The paths of the two annotation files, by split.

    Raises:
        ValueError: `processes` is less than 1.
        FileExistsError: `root` has annotations that were written with other settings.
    """
    processes = os.cpu_count() or 1 if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes: given {processes}, expected at least 1")
    root = Path(root)
    paths = _annotation_paths(root)
    complete = _check_existing(root, paths, settings)
    if complete and (root / MANIFEST).exists():
        print(f"{root} is already complete with these settings: nothing to do")
        return paths
    if not complete:
        _write_splits(root, paths, settings, processes)
    digests = {split: _digest([*sorted((root / split).glob("*.jpg")), path]) for split, path in paths.items()}
    manifest = {"version": GENERATOR_VERSION, "settings": settings.model_dump(mode="json"), "sha256": digests}
    write_text(root / MANIFEST, json.dumps(manifest, indent=1))
    return paths


def make_missing_shapes(data: Data) -> bool:
    """Write the data set that `data.shapes` describes if its folder lacks it; True if something was written.

    The folder is the one above that of `data.train_annotations`. Of several processes that call this at the same time,
    one writes and the others wait.
    Raises ConfigError for a wrong settings file, FileExistsError if the folder was written with other settings.
    """
    if data.shapes is None:
        return False
    settings, root = load_settings(data.shapes), Path(data.train_annotations).parent.parent
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        complete = _check_existing(root, _annotation_paths(root), settings)
        if complete and (root / MANIFEST).exists():
            return False
        if not complete:
            print(f"{root} is missing: making it as {data.shapes} says", flush=True)
        write_shapes(root, settings)
        return True


def _annotation_paths(root: Path) -> dict[str, Path]:
    return {split: root / "annotations" / f"{split}.json" for split in ("train", "val")}


def _check_existing(root: Path, paths: dict[str, Path], settings: ShapesSettings) -> bool:
    """Whether both annotation files are there; FileExistsError if one was written with other settings."""
    requested = {"version": GENERATOR_VERSION, **settings.model_dump(mode="json")}
    for path in filter(Path.exists, paths.values()):
        try:
            info = json.loads(path.read_text(encoding="utf-8"))["info"]
            known = {key: info[key] for key in ShapesSettings.model_fields if key in info}
            existing = {"version": info["version"], **ShapesSettings.model_validate(known).model_dump(mode="json")}
        except (ValueError, KeyError, TypeError, ValidationError):
            existing = {}
        differing = [
            f"{key} is {existing.get(key)!r}, requested {value!r}"
            for key, value in requested.items()
            if key not in existing or existing[key] != value
        ]
        if differing:
            raise FileExistsError(
                f"{path} was written with other settings ({'; '.join(differing)}). "
                f"Write to another folder, or delete {root} first; data.shapes=null uses it as it is."
            )
    return all(path.exists() for path in paths.values())


def _write_splits(root: Path, paths: dict[str, Path], settings: ShapesSettings, processes: int) -> None:
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
    for split, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(_coco_dict(splits[split], settings)))


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
    info = {"description": "shapes, a generated data set", "version": GENERATOR_VERSION}
    info |= settings.model_dump(mode="json")
    size = settings.size
    images = [
        {"id": i, "file_name": f"{i - 1:06d}.jpg", "width": size, "height": size} for i in range(1, len(scenes) + 1)
    ]
    annotations = [{"image_id": i, **annotation} for i, scene in enumerate(scenes, 1) for annotation in scene]
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)]
    categories = list(CATEGORIES[: settings.classes])
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _digest(files: list[Path]) -> str:
    """SHA-256 over the names and the contents of files."""
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.name.encode())
        sha.update(hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()
