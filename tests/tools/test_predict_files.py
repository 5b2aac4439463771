"""Which files tools/predict.py takes, and where it writes: nothing outside of its output folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from retina_tools.predict import check_output, find_images


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """val/x.png, train/a.jpg; the current folder is val."""
    for name in ("val/x.png", "train/a.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "val")
    return tmp_path


def test_inputs_above_the_current_folder(folders: Path) -> None:
    """The names of the outputs are below the output folder."""
    files, root = find_images([Path(), Path("../train/a.jpg")], Path("../out"))
    assert root == folders and [file.relative_to(root).as_posix() for file in files] == ["train/a.jpg", "val/x.png"]


def test_results_of_an_earlier_call_are_not_inputs(folders: Path) -> None:
    (folders / "val/pred").mkdir()
    (folders / "val/pred/x.png").touch()
    (folders / "link").symlink_to(folders / "val")
    for folder in (Path(), Path("../train/../val"), Path("../link")):
        files, root = find_images([folder], Path("../val/pred"))
        assert files == [folders / "val/x.png"]
        check_output(Path("../val/pred"), files, root, [folder])


def test_a_link_to_an_image_keeps_its_name(folders: Path) -> None:
    (folders / "val/link.png").symlink_to(folders / "train/a.jpg")
    assert find_images([Path("link.png")], Path("out")) == ([folders / "val/link.png"], folders / "val")
