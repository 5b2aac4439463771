"""The commands of tools/: one test of each starts a process, the others call its main()."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from command_helpers import run_main, without_permission
from PIL import Image
from pycocotools.coco import COCO

from retina.config import COCO_METRICS
from retina.config_file import load_config
from retina.data.coco import CocoDataset, read_image

pytestmark = pytest.mark.slow
TOOLS = Path(__file__).parents[2] / "tools"


def run_process(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def trained(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config file and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("cli")
    config = folder / "custom.yaml"
    config.write_text(f"base: {tiny_yaml}\noutput_dir: {folder}/run\ndetect: {{score_threshold: 0.001}}\n")
    done = run_process("train.py", config, "train.steps=4", "--resume")
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout and "evaluation at step 4" in done.stdout
    assert "learning rate 0.01 for 4 images a step, 0.01 for 4" in done.stdout
    return config, folder / "run"


def test_print_config_reads_back(tiny_yaml: Path, tmp_path: Path) -> None:
    shown = run_main("train.py", tiny_yaml, "train.lr=0.5", "--print-config")
    assert shown.returncode == 0
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    assert load_config(tmp_path / "shown.yaml") == load_config(tiny_yaml, ["train.lr=0.5"])


def test_a_run_ends_with_the_process_that_started_it(tiny_yaml: Path, tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "train.py", tiny_yaml, f"output_dir={tmp_path}/run", "train.steps=100000"]
    process = subprocess.Popen(
        [*command, "--end-with-parent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None and process.stdin is not None
    assert any(line.startswith(b"step 3/") for line in process.stdout)
    process.stdin.close()  # the same happens when the parent is killed
    assert process.wait(20) == -9
    process.stdout.close()


@pytest.mark.skipif(not hasattr(fcntl, "F_SETSIG"), reason="only Linux sends a signal for a closed pipe")
def test_it_ends_even_while_all_threads_are_blocked() -> None:
    code = (
        "import ctypes; from retina.parent_process import end_with_parent; end_with_parent(); "
        "print('ready', flush=True); ctypes.PyDLL(None).sleep(60)"  # a call through PyDLL holds the GIL
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == b"ready\n"
    process.stdin.close()
    assert process.wait(20) == -9
    process.stdout.close()


def test_a_used_run_folder_is_refused(trained: tuple[Path, Path]) -> None:
    config, folder = trained
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    again = run_main("train.py", config, "train.steps=4")
    assert again.returncode == 2 and "is not empty; --resume continues" in again.stderr and "Trace" not in again.stderr
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before


def test_eval_writes_metrics_and_results(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, folder = trained
    done = run_process("eval.py", config, "--checkpoint", folder / "last.pt", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics) == [*COCO_METRICS, "per_class", "score_threshold"]
    assert set(metrics["per_class"]) == {"red", "green", "blue"}
    last = json.loads((folder / "eval.json").read_text())[-1]
    assert metrics.pop("score_threshold")["per_class"].keys() == metrics["per_class"].keys()
    assert metrics == {key: value for key, value in last.items() if key != "step"}
    entries = json.loads((tmp_path / "out/detections.json").read_text())
    assert all(set(entry) == {"image_id", "category_id", "bbox", "score"} for entry in entries)
    assert "AP50" in done.stdout and str(tmp_path / "out/metrics.json") in done.stdout


def test_eval_measures_time_when_asked(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, folder = trained
    done = run_main("eval.py", config, "--checkpoint", folder / "last.pt", "--output", tmp_path / "out", "--time")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    cost = ["milliseconds", "gflops", "parameters", "peak_memory_mb"]
    assert list(metrics) == [*COCO_METRICS, "per_class", *cost, "score_threshold"] and all(
        metrics[name] > 0 for name in cost
    )
    assert f"{metrics['milliseconds']:.1f} ms per image at batch 1, from normalization to NMS" in done.stdout


def test_eval_reports_when_asked(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """tests/analysis tests the page. Its command repeats what was evaluated."""
    config, folder = trained
    checkpoint = ["--checkpoint", folder / "last.pt"]
    done = run_main("eval.py", config, *checkpoint, "--output", tmp_path / "out", "--time", "--report")
    assert done.returncode == 0 and done.stdout.endswith("out/report.html\n"), done.stderr
    metrics, data = (json.loads((tmp_path / "out" / name).read_text()) for name in ("metrics.json", "report.json"))
    assert f"{metrics['milliseconds']:.1f} milliseconds" in (tmp_path / "out/report.html").read_text()
    command = f"python tools/predict.py {folder / 'last.pt'} IMAGE_OR_FOLDER --score "
    assert data["commands"][0].startswith(command)
    (tmp_path / "again").mkdir()
    (tmp_path / "out/detections.json").rename(tmp_path / "again/found.json")
    done = run_main("eval.py", config, "--detections", tmp_path / "again/found.json", "--report")
    again = json.loads((tmp_path / "again/report.json").read_text())
    assert done.returncode == 0 and again["coco"] == data["coco"] and again["lost_ap"] == data["lost_ap"]
    assert not (tmp_path / "again/detections.json").exists(), "they are in found.json"
    # Thresholds of each class, as the report recommends them, are a flag of prediction.
    metrics["score_threshold"] = {"all": 0.0, "per_class": {"red": 1.0, "green": None, "blue": 1.0}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    image = Path(load_config(config).data.val_images) / "0000.png"
    done = run_main(
        "predict.py", config, image, *checkpoint, "--output", tmp_path, "--score", tmp_path / "metrics.json"
    )
    predicted = json.loads((tmp_path / "predictions.json").read_text())
    names = {entry["id"]: entry["name"] for entry in predicted["categories"]}
    assert done.returncode == 0 and {names[found["category_id"]] for found in predicted["annotations"]} == {"green"}
    for classes, status, message in (({"red": 0.5}, 0, "no threshold for green, blue; 0.0 is used"),
                                     ({"cat": 0.5}, 2, "its thresholds are for other classes (cat)")):  # fmt: skip
        metrics["score_threshold"] = {"all": 0.0, "per_class": classes}
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        scores = ["--score", tmp_path / "metrics.json"]
        done = run_main("predict.py", config, image, *checkpoint, "--output", tmp_path, *scores)
        assert done.returncode == status and message in done.stderr


def test_predict_draws_and_writes_a_coco_file(trained: tuple[Path, Path], coco_root: Path, tmp_path: Path) -> None:
    """Of a folder with folders, with the checkpoint alone; the file is as pycocotools and this project read it."""
    folder = tmp_path / "images"
    shutil.copytree(coco_root / "val", folder / "deep" / "er")
    Image.new("L", (70, 50)).save(folder / "gray.png")
    (folder / "notes.txt").write_text("no image")
    output = folder / "out"  # is not searched when the command is run again
    for run in (run_process, run_main):
        done = run("predict.py", trained[1], folder, "--output", output, "--score", "0.002")
        assert done.returncode == 0, done.stderr
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(output / "predictions.json")
    names = {image["file_name"] for image in coco.imgs.values()}
    assert names == {"gray.png", *(f"deep/er/{index:04}.png" for index in range(10))}
    assert len(coco.anns) > 20 and {entry["category_id"] for entry in coco.anns.values()} <= {3, 7, 20}
    assert {entry["name"] for entry in coco.cats.values()} == {"red", "green", "blue"}
    assert all(0.002 < entry["score"] < 1 for entry in coco.anns.values())
    data = CocoDataset(output / "predictions.json", folder)
    assert data.records.num_objects.sum() == len(coco.anns) and not data.notes
    for record in data.records:
        assert read_image(record.path, (record.width, record.height)) is not None
        with Image.open(output / record.path.relative_to(folder).with_suffix(".png")) as drawn:
            assert drawn.size == (record.width, record.height)


def test_predict_goes_on_past_unreadable_files(trained: tuple[Path, Path], coco_root: Path, tmp_path: Path) -> None:
    shutil.copytree(coco_root / "val", tmp_path / "images")
    (tmp_path / "images" / "0003.png").write_bytes(b"damaged")
    (tmp_path / "images" / "0005.png").write_bytes((coco_root / "val/0005.png").read_bytes()[:500])
    done = run_main("predict.py", trained[1] / "best.pt", tmp_path / "images", "--output", tmp_path / "out")
    assert done.returncode == 1 and "2 of 10 files could not be read:" in done.stderr
    assert [line for line in ("0003.png: not readable", "0005.png: not readable") if line in done.stderr] != []
    written = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert len(written) == 8 == len(list((tmp_path / "out").glob("*.png")))


def test_predict_goes_on_past_unreadable_folders(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images/locked").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images/a.png")
    monkeypatch.setattr(os, "scandir", without_permission(os.scandir, tmp_path / "images/locked"))
    done = run_main("predict.py", trained[1] / "best.pt", tmp_path / "images", "--output", tmp_path / "out")
    assert done.returncode == 1 and (tmp_path / "out/a.png").exists()
    assert done.stderr == f"{tmp_path}/images/locked: cannot be searched: Permission denied\n"


def test_the_checkpoint_alone_is_enough_for_eval(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """It gives the numbers of the config and the checkpoint together; overrides and the run folder are taken too."""
    config, folder = trained
    run_main("eval.py", config, "--checkpoint", folder / "best.pt", "--output", tmp_path / "both")
    alone = run_main("eval.py", "--checkpoint", folder / "best.pt", "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    for name in ("metrics.json", "detections.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    shutil.copytree(folder, tmp_path / "moved")
    done = run_main("eval.py", tmp_path / "moved", "data.workers=0")
    assert done.returncode == 0 and str(tmp_path / "moved/metrics.json") in done.stdout
    changes = ["detect.max_detections=1", f"data.val_annotations={tmp_path}/val.json"]
    shutil.copy(load_config(folder / "config.yaml").data.val_annotations, tmp_path / "val.json")
    of_run = ["eval.py", tmp_path / "moved/config.yaml", f"output_dir={tmp_path}/moved"]
    other, words = ["--checkpoint", folder / "best.pt"], (", ".join(changes[::-1]), "--tta", folder / "best.pt")
    for arguments, different in zip((changes, ["--tta"], other), words, strict=True):
        done = run_main(*of_run, *arguments)
        assert done.returncode == 2 and f"moved has the results of its run; for those with {different}" in done.stderr
    assert run_main(*of_run, *changes, "--output", tmp_path / "one").returncode == 0
    counts = Counter(entry["image_id"] for entry in json.loads((tmp_path / "one/detections.json").read_text()))
    assert set(counts.values()) == {1}
    gone = run_main("eval.py", "--checkpoint", folder / "best.pt", "data.val_annotations=gone.json")
    assert gone.returncode == 1 and "gone.json: no such annotation file" in gone.stderr
    assert "the settings of the checkpoint name this data" in gone.stderr


def test_plot_of_a_run_without_an_evaluation(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, folder = trained
    shutil.copy(folder / "metrics.csv", tmp_path)
    done = run_main("plot.py", config, f"output_dir={tmp_path}")
    assert done.returncode == 1 and done.stdout == f"{tmp_path}/results.png\n", done.stderr
    assert done.stderr == f"no detections.png: {tmp_path} has no evaluation yet; tools/eval.py {tmp_path} makes one\n"


def test_plot_draws_the_run(trained: tuple[Path, Path]) -> None:
    config, folder = trained
    done = run_process("plot.py", config, "--count", 2)
    assert done.returncode == 0, done.stderr
    for name in ("results.png", "detections.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_training_starts_from_a_checkpoint_and_refuses_a_damaged_one(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, folder = trained
    flags = [config, "train.steps=1", "train.warmup_steps=0", f"output_dir={tmp_path}/run"]
    done = run_main("train.py", *flags, f"model.weights={folder}/last.pt")
    assert done.returncode == 0, done.stderr
    assert f"from {folder}/last.pt; all 3 class outputs" in done.stdout
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(content)
    done = run_main("train.py", *flags[:-1], f"output_dir={tmp_path}/other", f"model.weights={tmp_path}/damaged.pt")
    assert done.returncode == 1 and "damaged.pt: " in done.stderr and "Traceback" not in done.stderr


def test_checkpoint_of_other_anchors_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, folder = trained
    arguments = ["anchors.octave_base=2", "--checkpoint", folder / "last.pt", "--output", tmp_path]
    done = run_main("eval.py", config, *arguments)
    assert done.returncode == 1 and "anchors.octave_base was 4.0, is 2.0" in done.stderr


def test_images_of_the_same_name_do_not_overwrite_each_other(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, folder = trained
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (name == "a" and "red") or "blue").save(tmp_path / name / "same.png")
    Image.new("RGB", (40, 40), "lime").save(tmp_path / "b" / "same.webp", lossless=True)
    images = [tmp_path / name for name in ("a/same.png", "b/same.png", "b/same.webp")]
    arguments = [config, *images, "--checkpoint", folder / "last.pt", "--output", tmp_path]
    assert run_main("predict.py", *arguments).returncode == 0
    for name, color in (("a/same.png", (255, 0, 0)), ("b/same.png", (0, 0, 255))):
        assert Image.open(tmp_path / name).getpixel((20, 20)) == color  # the input itself
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "same.png", "same.webp", "same_2.png", "same_3.png"
    ]  # fmt: skip
    assert run_main("predict.py", *arguments).returncode == 0
    assert len(list((tmp_path / "b").iterdir())) == 4, "the drawings of the first call are replaced"


def test_files_that_predict_did_not_write_are_kept(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Also in a later call, which replaces the drawings of the first."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.jpg")
    for name in ("a.png", "a_2.png"):  # a mask beside the photo, say
        Image.new("L", (4, 4), 9).save(tmp_path / name)
    arguments = [trained[1] / "last.pt", tmp_path / "a.jpg", "--output", tmp_path]
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(tmp_path / "a.jpg")
        done = run_main("predict.py", *arguments)
        assert done.returncode == 0 and f"{tmp_path}/a_3.png: " in done.stdout
        assert {Image.open(tmp_path / name).size for name in ("a.png", "a_2.png")} == {(4, 4)}
    red, _, blue = Image.open(tmp_path / "a_3.png").convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
    assert blue > red and not (tmp_path / "a_4.png").exists()


def test_checkpoint_of_other_classes_is_refused(trained: tuple[Path, Path], coco_root: Path, tmp_path: Path) -> None:
    config, folder = trained
    tree = json.loads((coco_root / "val.json").read_text())
    tree["categories"][0]["name"] = "purple"
    (tmp_path / "val.json").write_text(json.dumps(tree))
    other = [f"data.val_annotations={tmp_path}/val.json", "--output", tmp_path]
    done = run_main("eval.py", config, *other, "--checkpoint", folder / "last.pt")
    assert done.returncode == 1 and "was trained on other categories" in done.stderr
