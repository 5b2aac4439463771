"""A cell is worse only if other seeds and other images would show it, too."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import report_markdown, table_rows

from retina.analysis.results_file import read_results
from retina.analysis.scoring import score
from retina.data.annotations import read_annotations
from retina.study.cells import Study
from retina.study.study_file import load_study

NUM_IMAGES, PER_IMAGE = 12, 4


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two cells with two seeds, on images with four objects each, 30 pixels apart."""
    boxes = [(i, [30.0 * j, 5.0, 20.0, 20.0]) for i in range(NUM_IMAGES) for j in range(PER_IMAGE)]
    tree = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in range(NUM_IMAGES)],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": n, "image_id": i, "category_id": 1, "bbox": box} for n, (i, box) in enumerate(boxes)],
    }
    data = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}.json").write_text(json.dumps(tree))
        data += [f"{split}_annotations: {tmp_path}/{split}.json", f"{split}_images: {tmp_path}/{split}"]
    (tmp_path / "base.yaml").write_text(f"data: {{{', '.join(data)}}}\n")
    (tmp_path / "study.yaml").write_text("base: base.yaml\naxes: {loss.gamma: [1, 2]}\nseeds: [0, 1]\n")
    return load_study(tmp_path / "study.yaml", output=tmp_path / "out")


def finish(study: Study, missed: dict[float, list[tuple[int, int]]]) -> None:
    """`missed`: by gamma, the (image, object) that no training of the cell finds. Seed 1 misses one object more."""
    file = read_annotations(Path(study.cells[0].config.data.val_annotations))
    for cell in study.cells:
        absent = {*missed[cell.settings["loss.gamma"]], *([(11, 3)] if cell.seed else [])}
        found: list[dict[str, Any]] = [
            {"image_id": i, "category_id": 1, "bbox": [30.0 * j, 5.0, 20.0, 20.0], "score": 0.9 - 0.01 * i}
            for i in range(NUM_IMAGES)
            for j in range(PER_IMAGE)
            if (i, j) not in absent
        ]
        cell.folder.mkdir(parents=True)
        (cell.folder / "detections.json").write_text(json.dumps(found))
        metrics = score(file, read_results(cell.folder / "detections.json", file)).metrics
        result = {"step": 1, "metrics": metrics, "diverged": None, "milliseconds": None, "seconds": None}
        (cell.folder / "result.json").write_text(json.dumps(result))


def remarks(text: str) -> list[str]:
    return [row[-1].strip("*") for row in table_rows(text, "Average precision")]


def test_errors_on_all_images_are_worse(study: Study) -> None:
    finish(study, {1.0: [(i, 0) for i in range(NUM_IMAGES)], 2.0: []})
    text = report_markdown(study)
    assert remarks(text) == ["worse", "best"]
    assert "Image noise: the 12 validation images are drawn again 1000 times, alike for all runs." in text
    with (study.folder / "results.csv").open() as file:
        assert [row["exceeds_noise"] for row in csv.DictReader(file)] == ["True", ""]


def test_errors_on_few_images_may_be_chance(study: Study) -> None:
    """As many objects are missed, but on three of the twelve images: with other images the cells could be equal."""
    finish(study, {1.0: [(i, j) for i in range(3) for j in range(PER_IMAGE)], 2.0: []})
    assert remarks(report_markdown(study)) == ["within noise of best", "best"]
    (study.cells[0].folder / "detections.json").unlink()
    text = report_markdown(study)
    assert remarks(text) == ["worse", "best"], "the seeds alone"
    assert (
        f"The noise of the validation images is not included: {study.cells[0].folder.name}/detections.json is" in text
    )


def test_detections_that_do_not_give_the_ap_do_not_count(study: Study) -> None:
    """For example of another evaluation, or of a run with images that could not be read."""
    finish(study, {1.0: [(0, 0)], 2.0: []})
    (study.cells[1].folder / "detections.json").write_text("[]")
    assert "detections.json gives an AP of 0.00 and not the " in report_markdown(study)
    (study.cells[1].folder / "detections.json").write_text("[")
    assert "is not included: " in (text := report_markdown(study)) and "truncated" in text
