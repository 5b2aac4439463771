"""The decoded images of a small data set in one file, which all processes that train on it map into memory.

A file that is written once replaces the decoding of each image in each epoch. The pixels are those of `read_image`, so
a run has equal bits with and without the cache. Processes that need the same cache at the same time write it once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from retina.atomic_files import atomic_file, file_lock
from retina.data.annotations import DataError
from retina.data.coco import Record, read_image

READ_IMAGE_VERSION = 3  # increase it when `read_image` returns other pixels


class ImageCache:
    """The images of `records` by their position, as `read_image` returns them.

    The file is in `folder`. Its name is a hash of the paths, sizes and modification times of the image files and of the
    version of the decoder, so a changed file is never read from an old cache.

    Raises:
        DataError: `folder` cannot be written, or the disk has not enough free space.
    """

    def __init__(self, records: Sequence[Record], folder: Path) -> None:
        self.records = records
        ends = np.cumsum([3 * record.width * record.height for record in records], dtype=np.int64)
        self.starts = np.concatenate([[0], ends])
        self.path = folder / f"{_identity(records)}.images"
        self._bytes: NDArray[np.uint8] | None = None  # mapped at the first use, in each process
        if self.path.exists():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file_lock(folder / ".cache.lock"):
                if not self.path.exists():
                    self._write()
        except OSError as error:
            raise DataError(
                f"data.cache={folder}: cannot be written: {error.strerror}; use data.cache=null or another folder"
            ) from error

    def read(self, position: int) -> NDArray[np.uint8]:
        """A copy of the image, uint8 RGB (H, W, 3). Raises DataError for an image that cannot be read."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        record = self.records[position]
        if not self._bytes[self.starts[-1] + position]:
            return read_image(record.path, (record.width, record.height))
        image = self._bytes[self.starts[position] : self.starts[position + 1]]
        return image.reshape(record.height, record.width, 3).copy()

    def _write(self) -> None:
        """The images in order, then a byte for each: 1 if it could be read, else 0 and its pixels are zeros."""
        free = shutil.disk_usage(self.path.parent).free
        size = f"{self.starts[-1] / 2**30:.1f} GiB"
        if self.starts[-1] > 0.9 * free:
            raise DataError(
                f"data.cache: the decoded images need {size}, and {self.path.parent} has "
                f"{free / 2**30:.1f} GiB free; use data.cache=null, or a folder on another disk"
            )
        print(f"data.cache: writing {len(self.records)} decoded images, {size}, to {self.path.parent}", flush=True)
        readable = np.zeros(len(self.records), np.uint8)
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            for position, record in enumerate(self.records):
                try:
                    image = read_image(record.path, (record.width, record.height))
                    readable[position] = 1
                except DataError:  # raised again when the image is needed
                    image = np.zeros((record.height, record.width, 3), np.uint8)
                file.write(image.data)
            file.write(readable.data)


def _identity(records: Sequence[Record]) -> str:
    files: list[list[object]] = [["decoder", PIL.__version__, features.version("jpg"), READ_IMAGE_VERSION]]
    for record in records:
        try:
            status = record.path.stat()
            files.append([str(record.path.resolve()), record.width, record.height, status.st_size, status.st_mtime_ns])
        except OSError:
            files.append([str(record.path.resolve()), record.width, record.height])
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
