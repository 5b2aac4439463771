"""Which files tools/predict.py takes, and where it writes: nothing outside of its output folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_helpers import run_main, without_permission
from PIL import Image
from retina_tools.predict import check_output, find_images, is_drawing


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
    files, root, _ = find_images([Path(), Path("../train/a.jpg")], Path("../out"))
    assert root == folders and [file.relative_to(root).as_posix() for file in files] == ["train/a.jpg", "val/x.png"]


def test_results_of_an_earlier_call_are_not_inputs(folders: Path) -> None:
    (folders / "val/pred").mkdir()
    (folders / "val/pred/x.png").touch()
    (folders / "link").symlink_to(folders / "val")
    for folder in (Path(), Path("../train/../val"), Path("../link")):
        files, root, _ = find_images([folder], Path("../val/pred"))
        assert files == [folders / "val/x.png"]
        check_output(Path("../val/pred"), files, root, [folder])


def test_a_link_to_an_image_keeps_its_name(folders: Path) -> None:
    (folders / "val/link.png").symlink_to(folders / "train/a.jpg")
    assert find_images([Path("link.png")], Path("out")) == ([folders / "val/link.png"], folders / "val", [])


def test_linked_folders_are_searched_but_not_the_output(folders: Path) -> None:
    """Also where a link in the folder leads to the results of an earlier call."""
    (folders / "val/more").symlink_to(folders / "train")
    (folders / "train/pred").mkdir()
    (folders / "train/pred/x.png").touch()
    files, root, _ = find_images([folders / "val"], folders / "train/pred")
    assert [file.relative_to(root).as_posix() for file in files] == ["more/a.jpg", "x.png"]


def test_what_is_left_out_of_a_folder_is_said(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "val/b.jfif").touch()
    (folders / "val/locked").mkdir()
    monkeypatch.setattr(os, "scandir", without_permission(os.scandir, folders / "val/locked"))
    reason = f"{folders}/val/locked: cannot be searched: Permission denied"
    assert find_images([Path()], Path("out"))[2] == [reason]
    assert "val: 1 file with other endings than .bmp" in (said := capsys.readouterr().err) and ": 1 .jfif\n" in said
    with pytest.raises(SystemExit):
        find_images([Path("locked")], Path("out"))
    assert capsys.readouterr().err.endswith(f" in {folders}/val/locked\n{reason}\n")


def test_a_pipe_is_no_drawing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert not is_drawing(tmp_path / "a.png")  # and does not wait for a writer


@pytest.mark.parametrize("content", ["[]", '{"info": {"description": "mine"}, "images": []}', "damaged"])
def test_predictions_of_another_program_are_kept(tmp_path: Path, content: str) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    (tmp_path / "predictions.json").write_text(content)
    done = run_main("predict.py", "best.pt", tmp_path / "a.jpg", "--output", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --output: {tmp_path}/predictions.json exists and is not a file that this command wrote; give another "
        f"folder, such as {tmp_path}/predictions\n",
    )
    assert (tmp_path / "predictions.json").read_text() == content and len(list(tmp_path.iterdir())) == 2
