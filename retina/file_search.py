"""Searches a folder, and the folders in it, for files."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from retina.file_suffixes import IMAGE_SUFFIXES
from retina.plural import plural


class FoundImages(NamedTuple):
    """What `images_in` found."""

    files: list[Path]
    unreadable: list[str]  # the folders that could not be searched, each with the reason
    others: str  # a sentence about the files that are not taken; empty if there are none


def _refuse(error: OSError) -> None:
    raise error


def files_in(*folders: Path, on_error: Callable[[OSError], None] = _refuse, without: Path | None = None) -> list[Path]:
    """The files in folders and the folders in them, sorted, without hidden ones. Links are followed.

    A folder that is found under several names has the one without a link, and is searched once.

    Args:
        folders: to search.
        on_error: called for each folder that cannot be read.
        without: a folder that is not searched.

    Raises:
        OSError: a folder cannot be read; with another `on_error`, what that raises.
    """
    files: list[Path] = []
    visited = set() if without is None else {os.path.realpath(without)}
    starts = list(folders)
    while starts:
        links: list[Path] = []  # they are searched after all folders, and may lead back to one
        for place, inner, names in itertools.chain.from_iterable(os.walk(start, onerror=on_error) for start in starts):
            real = os.path.realpath(place)
            # Hidden folders have copies of files (.ipynb_checkpoints).
            inner[:] = [] if real in visited else [name for name in inner if not name.startswith(".")]
            links += [path for name in inner if (path := Path(place, name)).is_symlink()]
            files += [] if real in visited else [Path(place, name) for name in names if not name.startswith(".")]
            visited.add(real)
        starts = sorted(links)
    return sorted(files)


def images_in(*folders: Path, without: Path | None = None) -> FoundImages:
    """The files with an ending of IMAGE_SUFFIXES, and what was left out. The folders are those of `files_in`."""
    errors: list[OSError] = []
    files = files_in(*folders, on_error=errors.append, without=without)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    unreadable = [f"{error.filename}: cannot be searched: {error.strerror}" for error in errors]
    endings = Counter(suffix for file in files if (suffix := file.suffix.lower()) not in IMAGE_SUFFIXES)
    if not endings:
        return FoundImages(images, unreadable, "")
    counts = [f"{count:,} {ending or 'without one'}" for ending, count in endings.most_common(5)]
    others = (
        f"left out of {', '.join(map(str, folders))}: {plural(endings.total(), 'file')} with other endings than "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}: {', '.join(counts)}{', ...' if len(endings) > 5 else ''}"
    )
    return FoundImages(images, unreadable, others)
