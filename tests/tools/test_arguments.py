"""Arguments of the commands: paths with ~, where tools/predict.py may write, and what is said of wrong ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_helpers import run_main
from detector_helpers import save_random_detector
from PIL import Image

from retina.config_file import load_config


def test_the_home_folder_in_arguments(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves a quoted ~ as it is, and so does it within an argument such as --output=~/out."""
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(home / "images/a.png")
    (home / "images/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    shutil.copy(tiny_yaml, home / "mine.yaml")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    done = run_main("convert.py", "yolo", "~/images", "--categories", "x", "--output", "~/new/train.json")
    assert done.returncode == 0 and (home / "new/train.json").is_file(), done.stderr
    for tool, arguments, expected in (
        ("plot.py", ["~/mine.yaml", "output_dir=~/run"], f"{home}/run"),
        ("check_data.py", ["~/mine.yaml", "--html=~/gone/page.html"], f"--html: no folder {home}/gone"),
        ("predict.py", ["~/mine.yaml", "~/images", "--output=~/images"], f"images in {home}/images, "),
        ("predict.py", ["~/best.pt", "~/images"], f"{home}/best.pt: no such checkpoint"),
        ("predict.py", ["~/mine.yaml", "~/images", "--checkpoint=~/a.pt"], f"{home}/a.pt: no such checkpoint"),
        ("predict.py", ["~/mine.yaml", "~/images", "--score=~/a.json"], f"{home}/a.json"),
        ("loss_distribution.py", ["~/best.pt"], f"{home}/best.pt: no such checkpoint"),
        ("make_shapes.py", ["--settings=~/a.yaml", "--output=~/a"], f"{home}/a.yaml"),
    ):
        assert expected in run_main(tool, *arguments).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(
    ("inputs", "output", "place"),
    [
        (["a"], "a", "a"),
        (["a"], "b/../a", "a"),
        (["a", "b"], "", "a"),  # the drawings of a are written to a
        (["b", "b/deep"], "b/deep", "b/deep"),
        (["a", "b/deep/0.png"], "", "a"),
    ],
)
def test_predict_does_not_draw_between_the_images(tmp_path: Path, inputs: list[str], output: str, place: str) -> None:
    """A later call would take the drawings for images."""
    for name in ("a/0.png", "b/deep/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    done = run_main("predict.py", "best.pt", *(tmp_path / name for name in inputs), "--output", tmp_path / output)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
    assert f"--output: drawings would be written between the images in {tmp_path / place}, " in done.stderr
    other = tmp_path / output / "predictions"
    assert done.stderr.endswith(f"; give another folder, such as {other}\n")
    done = run_main("predict.py", "best.pt", *(tmp_path / name for name in inputs), "--output", other)
    assert done.returncode == 1 and "best.pt: no such checkpoint" in done.stderr, "the advice is accepted"


def test_predict_names_a_file_in_place_of_the_output_folder(tiny_yaml: Path) -> None:
    for output in (tiny_yaml, tiny_yaml / "a/b"):
        done = run_main("predict.py", "best.pt", tiny_yaml, "--output", output)
        assert (done.returncode, done.stderr) == (2, f"error: --output: {tiny_yaml} is a file, expected a folder\n")


def test_predict_names_a_folder_that_cannot_be_written(tiny_yaml: Path, tmp_path: Path) -> None:
    save_random_detector(tmp_path / "best.pt", load_config(tiny_yaml))
    (tmp_path / "out").symlink_to(tmp_path / "gone/disk")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    done = run_main("predict.py", tmp_path / "best.pt", tmp_path / "a.png", "--output", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.endswith(f"error: --output: {tmp_path}/out: File exists\n")


@pytest.mark.parametrize(
    ("tool", "arguments", "status", "expected"),
    [
        ("train.py", ["nowhere.yaml"], 2, "nowhere.yaml: no such configuration file"),
        ("train.py", ["CONFIG", "train.stpes=3"], 2, "did you mean train.steps?"),
        (
            "train.py",
            ["CONFIG", "data.train_annotations=no.json", "output_dir=OUT"],
            1,
            "no.json: no such annotation file",
        ),
        ("eval.py", ["CONFIG", "--checkpoint", "no.pt"], 1, "no.pt: no such checkpoint"),
        ("eval.py", ["CONFIG", "output_dir=OUT"], 1, "train first, or give --checkpoint"),
        ("eval.py", ["CONFIG", "--checkpoint", "CONFIG"], 1, "not readable as weights"),
        ("predict.py", ["CONFIG", "no.jpg"], 2, "no such image or folder: no.jpg"),
        ("eval.py", [], 2, "give a CONFIG or a CHECKPOINT"),
        ("eval.py", ["detect.nms_iou=1"], 2, "give a CONFIG or a CHECKPOINT"),
        (
            "eval.py",
            ["a.yaml", "--detections", "b.json", "--time"],
            2,
            "--detections FILE needs a CONFIG and no detector",
        ),
        ("eval.py", ["best.pt", "--tta", "--time"], 2, "give one of the two"),
        ("eval.py", ["--checkpoint", "a.onnx", "--time"], 2, "--time and --tta need a checkpoint"),
        ("eval.py", ["gone.pt"], 1, "gone.pt: no such checkpoint or run folder"),
        ("eval.py", ["--checkpoint", "OUT"], 1, "no such checkpoint or run folder; torchvision's weights are COCO_V1"),
        ("predict.py", ["CONFIG", "CONFIG", "--score", "3"], 2, "--score: given 3"),
        ("predict.py", ["CONFIG", "CONFIG", "--score", "-1"], 2, "expected a number from 0 to 1"),
        ("predict.py", ["best.pt", "CONFIG", "--checkpoint", "last.pt"], 2, "--checkpoint needs a CONFIG"),
    ],
)
def test_error_messages(
    tiny_yaml: Path, tmp_path: Path, tool: str, arguments: list[str], status: int, expected: str
) -> None:
    command = [part.replace("CONFIG", str(tiny_yaml)).replace("OUT", str(tmp_path / "run")) for part in arguments]
    done = run_main(tool, *command)
    assert done.returncode == status and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
