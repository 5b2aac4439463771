"""The search for images in a folder: links, hidden folders, and what is said of the files that are left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_helpers import without_permission

from retina.file_search import files_in, images_in


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("images/b/1.JPG", "images/.hidden/2.png", "images/._3.png", "store/deep/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_links_are_followed_once(root: Path) -> None:
    """Of two names beside each other the folder has its own; a link may lead to a folder above it."""
    (root / "images/a").symlink_to("b")
    (root / "images/c").symlink_to(root / "store")
    (root / "store/loop").symlink_to(root / "images")
    (root / "images/self").symlink_to("self")
    expected = ["b/1.JPG", "c/deep/4.png", "self"]
    assert [path.relative_to(root / "images").as_posix() for path in files_in(root / "images")] == expected
    left = [path.name for path in files_in(root / "images", without=root / "store/deep")]
    assert left == ["1.JPG", "self"], "also where a link leads to it"


def test_a_link_does_not_take_the_files_from_their_folder(root: Path) -> None:
    """Wherever the link is, also in another of the folders, and whichever is searched first."""
    for place, target in (("images/a/more", "images/b"), ("store/all", "images"), ("images/zoo", "store")):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).symlink_to(root / target)
    expected = ["images/b/1.JPG", "store/deep/4.png"]
    for folders in (("images", "store"), ("store", "images"), ("",)):
        found = files_in(*(root / folder for folder in folders))
        assert [path.relative_to(root).as_posix() for path in found] == expected, folders


def test_what_is_left_out_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "images"
    for name in ("b/a.jfif", "b/c.JFIF", "notes", "x.gif"):
        (folder / name).touch()
    (folder / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", without_permission(os.scandir, folder / "locked"))
    found = images_in(folder)
    assert found.files == [folder / "b/1.JPG", folder / "x.gif"]
    assert found.unreadable == [f"{folder}/locked: cannot be searched: Permission denied"]
    assert found.others == (
        f"left out of {folder}: 3 files with other endings than .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp: "
        "2 .jfif, 1 without one"
    )
    for number in range(9):
        (folder / f"data.{number}").touch()
    assert images_in(folder).others.endswith("2 .jfif, 1 .0, 1 .1, 1 .2, 1 .3, ...")
    with pytest.raises(PermissionError, match="locked"):
        files_in(folder)
    assert images_in(root / "store").others == ""
