"""The report from small data sets: its numbers against pycocotools, its page against its tables."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import columns

from retina.analysis import pictures
from retina.analysis.calibration import calibrate
from retina.analysis.matches import match_detections
from retina.analysis.page import write_report
from retina.analysis.report import Report, analyze
from retina.analysis.scoring import score_with_pycocotools

pytestmark = pytest.mark.slow  # draws many pictures
BOX = [50, 50, 80, 80]


def half_right(num_images: int) -> tuple[list[list[float]], list[list[float]]]:
    """An object in each image, and two detections that are right with the probability of their score."""
    rng = np.random.default_rng(0)
    objects = [[image, 0, *BOX, 0] for image in range(num_images)]
    detections = []
    for image in range(num_images):
        for place in (0, 200):
            value = round(float(rng.uniform(0.05, 0.95)), 6)
            box = BOX if place == 0 and rng.random() < value else [place, 200, 20, 20]
            detections.append([image, 0, *box, value])
    return objects, detections


def report_of(*rows: Any, milliseconds: float | None = None, **wrong: float) -> Report:
    annotations, results = columns(*rows)
    metrics = score_with_pycocotools(annotations, results).metrics
    return analyze(annotations, results, match_detections(annotations, results), metrics | wrong, milliseconds)


def write(report: Report, folder: Path, command: tuple[str, ...] = (), note: str = "") -> tuple[str, dict[str, Any]]:
    def black(path: Path, size: tuple[int, int]) -> Any:
        return np.zeros((size[1], size[0], 3), np.uint8)

    write_report(report, folder, folder, black, "a detector", command, note)
    return (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())


def test_a_number_that_pycocotools_does_not_give_is_an_error(tmp_path: Path) -> None:
    rows = (60, 1, *half_right(60))
    right = report_of(*rows)
    assert right.disagreement == ""
    ap = right.metrics["AP"]
    assert ap is not None
    wrong = report_of(*rows, AP=float(np.nextafter(ap, 1)))
    assert wrong.disagreement.startswith("TWO SCORERS DISAGREE. ") and f"{ap!r} by the matching" in wrong.disagreement
    assert "TWO SCORERS DISAGREE" in write(wrong, tmp_path)[0]


def test_all_numbers_of_the_text_are_in_the_data(tmp_path: Path) -> None:
    report = report_of(200, 1, *half_right(200), milliseconds=12.5)
    page, data = write(report, tmp_path)
    summary = {row["detections"]: row for row in data["calibration_summary"]}
    calibration = calibrate(report.matches, report.score)
    temperature = calibration.temperature
    assert not isinstance(temperature, str)
    everything, scaled = summary["all"], summary["second half with temperature"]
    assert everything["D_ECE"] == calibration.all.d_ece and everything["count"] == 400
    right = report.matches.found[0, 0] >= 0
    np.testing.assert_allclose(everything["mean_score"], report.matches.scores.mean())
    np.testing.assert_allclose(everything["precision"], right.mean())
    assert scaled["log_loss"] == temperature.log_loss_after and scaled["temperature"] == temperature.value
    assert summary["second half"]["log_loss"] == temperature.log_loss_before
    assert data["evaluation"][0] | {"images": 200, "excluded_images": 0, "milliseconds": 12.5} == data["evaluation"][0]
    for text in (f"D-ECE is {everything['D_ECE']:.3f} over 400 detections",
                 f"temperature of {scaled['temperature']:.2f}",
                 f"to {scaled['log_loss']:.3f}", "12.5 milliseconds for an image at batch 1, 80.0 images"):  # fmt: skip
        assert text in page


def test_commands_are_quoted_and_keep_exactly_the_scores(tmp_path: Path) -> None:
    """Two scores that differ in the eighth digit."""
    objects = [[image, 0, *BOX, 0] for image in range(2)]
    detections = [[0, 0, *BOX, 0.8], [1, 0, *BOX, 0.70000006], *([0, 0, 200, 200, 9, 9, 0.70000004] for _ in range(9))]
    report = report_of(2, 1, objects, detections)
    _, data = write(report, tmp_path / "an output", ("python", "tools/predict.py", "my runs/best.pt", "IMAGE"))
    first, second = (shlex.split(command) for command in data["commands"])
    assert first[:4] == second[:4] == ["python", "tools/predict.py", "my runs/best.pt", "IMAGE"]
    assert second[-1] == f"{tmp_path}/an output/metrics.json"
    assert 0.70000004 < float(first[-1]) < 0.70000006 and f"at least {first[-1]}:" in data["summary"][-1]
    without, data = write(report, tmp_path / "other", note="No command is given here.")
    assert data["commands"] == [] and "<pre>" not in without and "No command is given here." in without


def test_another_ap50_of_tide_is_explained(tmp_path: Path) -> None:
    """Each class has 60 confident false detections, so the 100 of an image do not reach the right ones."""
    wrong = [[0, label, 300, 300, 5 + i, 9, 0.9 - 0.001 * i] for label in range(2) for i in range(60)]
    right = [[0, label, *BOX, 0.1] for label in range(2)]
    objects = [[0, label, *BOX, 0] for label in range(2)]
    assert "COCO 100 of each class" in write(report_of(1, 2, objects, wrong + right), tmp_path)[0]
    assert "COCO 100 of each class" not in write(report_of(1, 2, objects, right), tmp_path)[0]


def test_everything_in_a_crowd_region(tmp_path: Path) -> None:
    """No detection counts, so there is nothing to calibrate, and no AP."""
    page, data = write(report_of(1, 1, [[0, 0, *BOX, 1]], [[0, 0, *BOX, 0.9]]), tmp_path)
    assert data["summary"] == ["There are no objects in the 1 image, so there is no AP."]
    assert "there are no detections that count" in page and data["calibration"] == []


def test_nothing_right_has_no_recommended_threshold_anywhere(tmp_path: Path) -> None:
    page, data = write(report_of(1, 1, [[0, 0, *BOX, 0]], [[0, 0, 200, 200, 9, 9, 0.9]]), tmp_path)
    assert "there is no threshold to recommend" in data["summary"][-1] and "kept at the recommended" not in page
    assert "AP is 0.0 on 1 image with 1 object." in data["summary"][0] and "D-ECE is 0.900 over 1 detection." in page


def test_a_box_with_a_negative_width_is_no_object(tmp_path: Path) -> None:
    """COCO does not count an object with a negative area."""
    objects = [[0, 0, *BOX, 0], [0, 0, 300, 50, -20, 80, 0]]
    _, data = write(report_of(1, 1, objects, [[0, 0, *BOX, 0.9]]), tmp_path)
    assert "AP is 100.0 on 1 image with 1 object." in data["summary"][0]
    annotations, results = columns(1, 1, objects, [[0, 0, *BOX, 0.9]])
    annotations = annotations._replace(areas=np.abs(annotations.areas))  # as some files say, so that COCO counts it
    metrics = score_with_pycocotools(annotations, results).metrics
    _, data = write(analyze(annotations, results, match_detections(annotations, results), metrics), tmp_path)
    assert "with 2 objects." in data["summary"][0] and metrics["AP"] == pytest.approx(51 / 101)


def test_the_sentence_counts_the_class_that_gains(tmp_path: Path) -> None:
    """Objects of class 1 taken for class 0: without these errors class 1 would gain, so their number is named."""
    objects = [[image, image % 2, *BOX, 0] for image in range(8)]
    detections = [[image, 0, *BOX, 0.9] for image in range(8)]
    _, data = write(report_of(8, 2, objects, detections), tmp_path)
    assert "most of all for class 1 (4 errors; 100.0 points)" in data["summary"][1]
    errors = {row["class"]: row["errors"] for row in data["lost_ap"] if row["kind"] == "class"}
    assert errors == {"all": 4, "class 0": 0, "class 1": 4}


def test_the_gallery_names_the_kind_of_each_error(tmp_path: Path) -> None:
    detections = [[0, 1, 70, 70, 80, 80, 0.9], [0, 0, 300, 300, 50, 50, 0.8]]  # wrong class and box; nothing there
    _, data = write(report_of(1, 2, [[0, 0, *BOX, 0]], detections), tmp_path)
    kinds = [row["kind"] for row in data["gallery"] if row["gallery"] == "background"]
    assert kinds == ["both", "background"]


def test_an_unknown_interval_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "figure_picture", lambda figure, *_: figure)
    objects = [[image, image % 2, *BOX, 0] for image in range(12)]
    figure: Any = pictures.plot_class_ap(report_of(12, 2, objects, [[0, 0, *BOX, 0.9]]))
    [bars] = figure.axes[0].containers[0].lines[2]
    lengths = [np.ptp(segment[:, 0]) for segment in bars.get_segments() if len(segment)]
    assert len(lengths) == 2 and min(lengths) > 0, "all classes and class 0, but not class 1"


def test_a_class_that_is_never_found_has_no_interval(tmp_path: Path) -> None:
    objects = [[image, image % 2, *BOX, 0] for image in range(12)]
    page, data = write(report_of(12, 2, objects, [[0, 0, *BOX, 0.9]]), tmp_path)
    assert data["classes"][1]["AP"] == 0 and data["classes"][1]["low"] is None
    assert "0.0 to 0.0" not in page and re.search("<td[^>]*>class 1</td>.*?<td[^>]*>-</td>", page)
