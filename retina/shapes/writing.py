"""Writes the generated data set: scenes of scene.py as JPEG files and annotations in COCO format.

Input: the number of images, their side in pixels, a seed. Output: a folder. Its bytes do not depend on the number of
processes.
"""

import contextlib
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
from tqdm import tqdm

from retina.atomic_files import write_text
from retina.shapes.layout import CATEGORIES
from retina.shapes.scene import GENERATOR_VERSION, draw_scene

VAL_START = 1_000_000  # index of the first val scene; fixed, so that no scene depends on the number of images
_JPEG_QUALITY = 92


def _write_scene(arguments: tuple[Path, int, int, int]) -> list[dict[str, Any]]:
    path, seed, index, size = arguments
    image, annotations = draw_scene(seed, index, size)
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


def _check_existing(root: Path, paths: dict[str, Path], info: dict[str, Any]) -> bool:
    """Whether the folder is complete; FileExistsError if it holds a data set with other settings."""
    for path in filter(Path.exists, paths.values()):
        try:
            existing = json.loads(path.read_text())["info"]
        except (ValueError, KeyError, TypeError):
            existing = {}
        differing = [
            f"{key} is {existing.get(key)!r}, requested {info[key]!r}" for key in info if existing.get(key) != info[key]
        ]
        if differing:
            raise FileExistsError(
                f"{path} was written with other settings ({'; '.join(differing)}). "
                f"Write to another folder, or delete {root} first."
            )
    return all(path.exists() for path in paths.values())


def write_shapes(
    root: Path, *, train: int, val: int, size: int, seed: int = 0, processes: int | None = None
) -> dict[str, Path]:
    """Write `root`/{train,val}/000000.jpg ... and `root`/annotations/{train,val}.json, in COCO format.

    A scene depends on `size`, `seed` and its index alone, not on the number of images. Annotations are written last, so
    if they exist, the images are complete, and a second call with the same settings does nothing.

    Args:
        root: the folder; it is created if it does not exist.
        train: number of training images, 1 to 1,000,000.
        val: number of held-out images, at least 1.
        size: side of the square images in pixels, >= 64.
        seed: of the data set, >= 0.
        processes: number of processes that draw; None: one for each core.

    Returns:
        The paths of the two annotation files, by split.

    Raises:
        ValueError: an argument is out of its range.
        FileExistsError: `root` has annotations that were written with other settings.
    """
    processes = os.cpu_count() or 1 if processes is None else processes
    if not (1 <= train <= VAL_START and val >= 1 and size >= 64 and seed >= 0 and processes >= 1):
        raise ValueError(
            f"got {train=}, {val=}, {size=}, {seed=}, {processes=}; accepted are train 1 to {VAL_START}, val >= 1, "
            "size >= 64, seed >= 0, processes >= 1"
        )
    root = Path(root)
    info = {"description": "shapes, a generated data set", "version": GENERATOR_VERSION}
    info |= {"seed": seed, "size": size, "train": train, "val": val}
    paths = {split: root / "annotations" / f"{split}.json" for split in ("train", "val")}
    if _check_existing(root, paths, info):
        print(f"{root} is already complete with these settings: nothing to do")
        return paths

    splits: dict[str, list[list[dict[str, Any]]]] = {}
    with contextlib.ExitStack() as stack:
        map_scenes: Callable[..., Iterable[Any]] = map
        if processes > 1:  # spawn, because a fork copies locks that other threads hold; one OpenCV thread in each
            pool = multiprocessing.get_context("spawn").Pool(processes, cv2.setNumThreads, (0,))
            map_scenes = partial(stack.enter_context(pool).imap, chunksize=8)
        for split, count, start in (("train", train, 0), ("val", val, VAL_START)):
            (root / split).mkdir(parents=True, exist_ok=True)
            scenes = [(root / split / f"{i:06d}.jpg", seed, start + i, size) for i in range(count)]
            splits[split] = list(_progress(map_scenes(_write_scene, scenes), count, split))

    for split, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(_coco_dict(splits[split], size, info)))
    return paths


def _coco_dict(scenes: list[list[dict[str, Any]]], size: int, info: dict[str, Any]) -> dict[str, Any]:
    images = [
        {"id": i, "file_name": f"{i - 1:06d}.jpg", "width": size, "height": size} for i in range(1, len(scenes) + 1)
    ]
    annotations = [{"image_id": i, **annotation} for i, scene in enumerate(scenes, 1) for annotation in scene]
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)]
    return {"info": info, "images": images, "annotations": annotations, "categories": list(CATEGORIES)}
