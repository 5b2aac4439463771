"""tools/compare.py on run folders and results files: what it says, writes and refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import inspect_page, needs_chromium
from command_helpers import run_main
from compare_helpers import detections, write_run

from retina.analysis import compared_runs
from retina.config import COCO_METRICS
from retina.config_file import load_config

pytestmark = pytest.mark.slow


@needs_chromium
def test_a_better_run_is_called_better(runs: dict[str, Path], tmp_path: Path, truth: dict[str, Any]) -> None:
    output = tmp_path / "out"
    done = run_main("compare.py", runs["worse_s0"], runs["better_s0"], "--output", output)
    assert done.returncode == 0, done.stderr
    assert "\nB is better than A by " in done.stdout and "on images like these 10." in done.stdout
    assert "One training on each side: how much another seed would change the difference is not part" in done.stdout
    data = json.loads((output / "comparison.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    classes = [entry["name"] for entry in truth["categories"] if entry["name"] in rows]
    by_frequency = sorted(classes, key=lambda name: -rows[name]["objects"])
    assert list(rows) == [*(name for name in COCO_METRICS if name in rows), *by_frequency]
    ap = rows["AP"]
    assert ap["value"] == pytest.approx(ap["b"] - ap["a"]) and 0 < ap["low"] < ap["value"] < ap["high"]
    assert f"by {100 * ap['value']:.2f} AP" in data["verdict"]
    with (output / "comparison.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(rows)
    with (output / "images.csv").open() as file:
        changes = [abs(float(row["errors_b"]) - float(row["errors_a"])) for row in csv.DictReader(file)]
    assert len(changes) == 10 and changes == sorted(changes, reverse=True)
    page = inspect_page((output / "comparison.html").read_text(), tmp_path, 1200)
    assert data["verdict"] in page["text"] and all(page["images"]) and len(page["images"]) >= 6
    assert "errors with A" in page["text"] and page["title"] == "Comparison of A and B"


def test_several_seeds_on_a_side(runs: dict[str, Path], tmp_path: Path) -> None:
    sides = ["--a", runs["better_s0"], runs["better_s1"], "--b", runs["worse_s0"], runs["worse_s1"]]
    done = run_main("compare.py", *sides, "--output", tmp_path / "out")
    assert (
        "A is better than B by " in done.stdout and "2 and 2 trainings: the interval is for other seeds" in done.stdout
    )
    data = json.loads((tmp_path / "out/comparison.json").read_text())
    aps = [row["AP"] for row in data["runs"]]
    assert [row["side"] for row in data["runs"]] == ["A", "A", "B", "B"]
    for name, ap in zip(("better_s0", "better_s1", "worse_s0", "worse_s1"), aps, strict=True):
        assert f"{name} (AP {100 * ap:.2f})" in done.stdout
    first = data["rows"][0]
    assert first["a"] == pytest.approx(np.mean(aps[:2])) and first["b"] == pytest.approx(np.mean(aps[2:]))
    pooled = np.sqrt((np.var(aps[:2], ddof=1) + np.var(aps[2:], ddof=1)) / 2)
    assert first["seed_sd"] == pytest.approx(pooled) and data["seeds_degrees_of_freedom"] == 2
    page = (tmp_path / "out/comparison.html").read_text()
    for text in (done.stdout, page):
        assert f"standard deviation of {100 * pooled:.2f} over seeds (2 degrees of freedom)" in text
    one = run_main("compare.py", *sides[:2], *sides[3:], "--output", tmp_path / "out")
    assert "A has one training; its seed noise is taken to be that of the other." in one.stdout


def test_a_side_has_one_training_of_each_seed(
    runs: dict[str, Path], tmp_path: Path, tiny_yaml: Path, truth: dict[str, Any]
) -> None:
    copied = shutil.copytree(runs["better_s0"], tmp_path / "copied")
    sides = ["--a", runs["better_s0"], copied, "--b", runs["worse_s0"], "--output", tmp_path / "out"]
    done = run_main("compare.py", *sides)
    assert done.returncode == 2 and "copied have the same settings and the same seed" in done.stderr
    other = write_run(tmp_path / "other", tiny_yaml, detections(truth, 0.02, 9), "seed=9", "loss.gamma=1")
    done = run_main("compare.py", *sides[:2], other, *sides[3:])
    assert done.returncode == 0
    assert "The trainings of one side differ in loss.gamma, and not only in the seed." in done.stdout
    assert "The trainings of one side" in (tmp_path / "out/comparison.html").read_text()


def test_detections_of_another_checkpoint_are_named(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [runs["worse_s0"], runs["better_s0"], "--output", tmp_path / "out"]
    run_main("compare.py", *arguments)
    aps = [row["AP"] for row in json.loads((tmp_path / "out/comparison.json").read_text())["runs"]]
    for (name, last), ap in zip({"worse_s0": 0.0, "better_s0": -0.25}.items(), aps, strict=True):
        entries = [{"step": 3, "AP": ap}, {"step": 6, "AP": ap + last}]
        (runs[name] / "eval.json").write_text(json.dumps(entries))
    done = run_main("compare.py", *arguments)
    assert "worse_s0: its last evaluation" not in done.stdout
    expected = f"better_s0: its last evaluation had an AP of {100 * (aps[1] - 0.25):.2f}, these detections have"
    assert f"{expected} {100 * aps[1]:.2f}. Either images could not be read" in done.stdout
    assert "tools/eval.py writes those of best.pt" in done.stdout
    data = load_config(runs["worse_s0"] / "config.yaml").data
    done = run_main("compare.py", *arguments, "--annotations", data.val_annotations)
    assert "its last evaluation" not in done.stdout, "which was with other annotations, perhaps"
    (runs["better_s0"] / "eval.json").write_text("[{")
    done = run_main("compare.py", *arguments)
    assert done.returncode == 2 and "eval.json: is damaged" in done.stderr


def test_equal_quality_is_not_called_different(tmp_path: Path, tiny_yaml: Path, truth: dict[str, Any]) -> None:
    a, b = (write_run(tmp_path / str(seed), tiny_yaml, detections(truth, 0.1, seed)) for seed in (3, 4))
    done = run_main("compare.py", a, b, "--output", tmp_path / "out")
    assert "Which one is better is not known: " in done.stdout and "would be found in four of five" in done.stdout
    copied = shutil.copytree(a, tmp_path / "copy")
    same = run_main("compare.py", a, copied, "--output", tmp_path / "out")
    assert "A and B have the same AP, whichever images are drawn." in same.stdout


def test_without_objects(tmp_path: Path, coco_root: Path, truth: dict[str, Any]) -> None:
    (tmp_path / "none.json").write_text(json.dumps({**truth, "annotations": []}))
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text(json.dumps(detections(truth, 0.1)))
    files = [tmp_path / "a.json", tmp_path / "b.json", "--annotations", tmp_path / "none.json"]
    done = run_main("compare.py", *files, "--images", coco_root / "val", "--output", tmp_path / "out")
    assert done.returncode == 0 and "There are no objects, so there is no AP" in done.stdout
    assert "more comparisons" not in done.stdout
    (tmp_path / "none.json").write_text(json.dumps({**truth, "annotations": [], "images": []}))
    (tmp_path / "b.json").write_text("[]")
    done = run_main("compare.py", *files, "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: no image is left to count")


def test_false_detections_of_a_side_with_nothing_right(tmp_path: Path, coco_root: Path, truth: dict[str, Any]) -> None:
    """They are errors, and with [] on the other side the AP is the same although the detections are not."""
    wrong = [{**entry, "bbox": [-50, -50, 1, 1]} for entry in detections(truth, 0)]
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text(json.dumps(wrong))
    files = [tmp_path / "a.json", tmp_path / "b.json", "--annotations", coco_root / "val.json"]
    done = run_main("compare.py", *files, "--output", tmp_path / "out")
    assert "A and B have the same AP, whichever images are drawn." in done.stdout
    images = json.loads((tmp_path / "out/comparison.json").read_text())["images"]
    assert sum(row["errors_b"] - row["errors_a"] for row in images) == len(wrong)


def test_a_difference_that_does_not_vary(tmp_path: Path, coco_root: Path, truth: dict[str, Any]) -> None:
    """Everything is found with B and nothing with A, on every image: no interval, and none is drawn."""
    right = [{**entry, "score": 0.9} for entry in detections(truth, 0) if entry["bbox"] != [1.0, 2.0, 9.0, 9.0]]
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text(json.dumps(right))
    files = [tmp_path / "a.json", tmp_path / "b.json", "--annotations", coco_root / "val.json"]
    done = run_main("compare.py", *files, "--output", tmp_path / "out")
    assert "B has 100.00 AP more than A on" in done.stdout and "the same however the images are drawn" in done.stdout
    assert "nan" not in done.stdout


def test_two_classes_with_one_name(tmp_path: Path, coco_root: Path, truth: dict[str, Any]) -> None:
    for category in truth["categories"]:
        category["name"] = "cell"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for seed, name in enumerate("ab"):
        (tmp_path / f"{name}.json").write_text(json.dumps(detections(truth, 0.1, seed)))
    files = [tmp_path / "a.json", tmp_path / "b.json", "--annotations", tmp_path / "truth.json"]
    done = run_main("compare.py", *files, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert all(f"cell (id {category['id']})" in done.stdout for category in truth["categories"])


def test_another_scorer_is_asked(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truth: dict[str, Any]
) -> None:
    right = compared_runs.score

    def wrong(*arguments: Any) -> Any:
        evaluation = right(*arguments)
        return evaluation._replace(
            metrics=evaluation.metrics | {"AP": float(np.nextafter(evaluation.metrics["AP"], 1))}
        )

    monkeypatch.setattr(compared_runs, "score", wrong)
    done = run_main("compare.py", runs["worse_s0"], runs["better_s0"], "--output", tmp_path / "out")
    assert done.returncode == 1 and "ERROR: TWO SCORERS DISAGREE" in done.stderr and "better_s0: AP is" in done.stderr
    assert "TWO SCORERS DISAGREE" in (tmp_path / "out/comparison.html").read_text()


def test_results_files_as_other_programs_write_them(tmp_path: Path, coco_root: Path, truth: dict[str, Any]) -> None:
    """A byte order mark, and ids as 1.0, are accepted as in annotations."""
    entries = detections(truth, 0.1)
    whole = [{**e, "image_id": float(e["image_id"]), "category_id": float(e["category_id"])} for e in entries]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(whole), encoding="utf-8")
    files = [tmp_path / "a.json", tmp_path / "b.json", "--annotations", coco_root / "val.json"]
    assert "A and B have the same AP" in run_main("compare.py", *files, "--output", tmp_path / "out").stdout


def test_the_settings_of_another_version_do_not_matter_where_all_is_given(
    runs: dict[str, Path], tmp_path: Path, coco_root: Path
) -> None:
    for name in ("worse_s0", "better_s0"):
        (runs[name] / "config.yaml").write_text("no.such.key: 1\n")
    given = ["--annotations", coco_root / "val.json", "--images", coco_root / "val", "--output", tmp_path / "out"]
    assert run_main("compare.py", runs["worse_s0"], runs["better_s0"], *given).returncode == 0
    assert run_main("compare.py", runs["worse_s0"], runs["better_s0"]).returncode == 2


def test_results_of_other_programs(runs: dict[str, Path], tmp_path: Path, coco_root: Path) -> None:
    """Without a config the annotations are given, and pictures only with --images."""
    files = []
    for name in ("worse_s0", "better_s0"):
        files.append(tmp_path / f"{name}.json")
        shutil.copy(runs[name] / "detections.json", files[-1])
    refused = run_main("compare.py", *files)
    assert refused.returncode == 2 and "no config.yaml beside the detections; give --annotations FILE" in refused.stderr
    arguments = [*files, "--annotations", coco_root / "val.json", "--output", tmp_path / "out"]
    done = run_main("compare.py", *arguments)
    assert "B is better than A" in done.stdout
    page = (tmp_path / "out/comparison.html").read_text()
    assert "There are no pictures" in page and "image/jpeg" not in page
    run_main("compare.py", *arguments, "--images", coco_root / "val")
    assert "image/jpeg" in (tmp_path / "out/comparison.html").read_text()


def test_an_image_file_that_is_missing_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    done = run_main(
        "compare.py", runs["worse_s0"], runs["better_s0"], "--images", tmp_path, "--output", tmp_path / "out"
    )
    assert done.returncode == 0 and "No such file" in (tmp_path / "out/comparison.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: "", "the file is empty"),
        (lambda entries: "[1, 2]", "Expected object, got int in entry [0]; expected a list of"),
        (lambda entries: json.dumps(entries)[:-9], "truncated"),
        (lambda entries: json.dumps({"annotations": entries}), "expected a list of detections"),
        (lambda entries: json.dumps([entries[0] | {"score": float("nan")}]), "NaN in [0].score"),
        (
            lambda entries: json.dumps([entries[0], entries[0] | {"bbox": [1, 2, float("inf"), 4]}]),
            "Infinity in [1].bbox",
        ),
        (lambda entries: json.dumps([entries[0] | {"image_id": 999}]), "[0].image_id 999"),
        (lambda entries: json.dumps([entries[0] | {"category_id": 4}]), "[0].category_id 4"),
        (lambda entries: json.dumps([entries[0] | {"bbox": [1, 2, 3]}]), "bbox"),
        (lambda entries: json.dumps([{"image_id": 1}]), "category_id"),
        (lambda entries: json.dumps([entries[0] | {"score": "high"}]), "score"),
        (
            lambda entries: json.dumps(entries)[:-1].replace(str(entries[0]["score"]), "1e999") + "]",
            "out of range in entry [0].score",
        ),
    ],
)
def test_detections_that_cannot_be_scored(
    change: Any, message: str, runs: dict[str, Path], tmp_path: Path, truth: dict[str, Any]
) -> None:
    file = runs["worse_s0"] / "detections.json"
    file.write_text(change(json.loads(file.read_text())))
    done = run_main("compare.py", runs["worse_s0"], runs["better_s0"], "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith(f"error: {file}: ") and message in done.stderr, done.stderr


def test_runs_that_cannot_be_compared(
    runs: dict[str, Path], tmp_path: Path, tiny_yaml: Path, truth: dict[str, Any]
) -> None:
    a, b = runs["worse_s0"], runs["better_s0"]
    fewer = {**truth, "images": truth["images"][:-1]}
    fewer["annotations"] = [e for e in truth["annotations"] if e["image_id"] != truth["images"][-1]["id"]]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    moved = {**truth, "annotations": [{**e, "bbox": [1, 1, 2, 2]} for e in truth["annotations"]]}
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    shuffled = {**truth, "annotations": truth["annotations"][::-1], "images": truth["images"][::-1]}
    (tmp_path / "shuffled.json").write_text(json.dumps(shuffled))

    def other(name: str) -> Path:
        return write_run(tmp_path / name, tiny_yaml, [], f"data.val_annotations={tmp_path}/{name}.json")

    (tmp_path / "empty").mkdir()
    cases = {
        (a,): "given 1 run; expected RUN_A RUN_B",
        (a, b, a): "given 3 runs; expected RUN_A RUN_B",
        ("--a", a): "given 1 run for --a and 0 for --b",
        (a, b, "--a", a): "give RUN_A RUN_B, or --a RUN ... --b RUN ..., not both",
        (a, a): f"{a} is given twice",
        ("--a", a, a / "detections.json", "--b", b): "given twice",
        (a, tmp_path / "nothing"): "no such run folder or results file",
        (a, tmp_path / "empty"): "has no detections.json",
        (a, b, "--annotations", tmp_path / "no.json"): "no such annotation file",
        (a, other("fewer")): "the runs are on different data sets",
        (a, other("moved")): "the boxes differ",
    }
    for arguments, message in cases.items():
        done = run_main("compare.py", *arguments)
        assert done.returncode == 2 and message in done.stderr, (arguments, done.stderr)
    assert run_main("compare.py", a, other("shuffled"), "--output", tmp_path / "out").returncode == 0
