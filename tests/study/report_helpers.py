"""Shared by the tests of the report: a study file, and the result files of its runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retina.config import COCO_METRICS
from retina.study.cells import Cell, Study
from retina.study.report import write_report
from retina.study.study_file import load_study

UNSAFE_NAME = "a<b|c $1_$2_"  # matplotlib cannot read it as mathematics
COUNTS = {"rare": 1, "often": 6, UNSAFE_NAME: 3}  # objects of each class; the crowd region of "rare" is not counted
ALPHAS = "axes: {loss.alpha: [0.25, 0.5, 0.75, 0.9, 0.99]}\nset: {loss.gamma: 0}\npaper: [table1a]\n"
GRID = "axes: {loss.gamma: [0, 1, 2], loss.alpha: [0.25, 0.75]}\n"
ONE_SEED, THREE_SEEDS = "seeds: [0]\n", "seeds: [0, 1, 2]\n"
# AP in percent of three seeds: mean 0.5, 31, 34, 33.5, 36
PERCENT = {0.25: (0.4, 0.5, 0.6), 0.5: (30, 31, 32), 0.75: (33, 34, 35), 0.9: (31.5, 33.5, 35.5), 0.99: (36, 36, 36)}


def write_study(root: Path, text: str) -> Study:
    names = list(COUNTS)
    objects = [{"category_id": names.index(name), "iscrowd": 0} for name in names for _ in range(COUNTS[name])]
    objects += [{"category_id": 0, "iscrowd": 1}] * 9
    tree = {
        "images": [{"id": id, "file_name": f"{id}.jpg", "width": 64, "height": 48} for id in (0, 1)],
        "annotations": [{"image_id": 0, "bbox": [0, 0, 9, 9]} | values for values in objects],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
    }
    data = []
    for split in ("train", "val"):
        (root / split).mkdir(exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(tree), encoding="utf-8-sig")  # with a byte order mark
        data += [f"{split}_annotations: {root}/{split}.json", f"{split}_images: {root}/{split}"]
    (root / "base.yaml").write_text(f"data: {{{', '.join(data)}}}\ntrain: {{steps: 60, batch_size: 8}}\n")
    (root / "study.yaml").write_text(f"base: base.yaml\n{text}")
    return load_study(root / "study.yaml", output=root / "out")


def write_result(cell: Cell, **values: Any) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    result = {"step": 60, "metrics": None, "diverged": None, "milliseconds": None, "seconds": 12.5, **values}
    (cell.folder / "result.json").write_text(json.dumps(result))


def write_finished(cell: Cell, percent: float, **values: Any) -> None:
    fractions = dict.fromkeys(COCO_METRICS, 0.5) | {"AP": percent / 100, "AP75": 0.25, "APs": None}
    per_class = {"rare": None, "often": percent / 90, UNSAFE_NAME: percent / 100}
    write_result(cell, metrics=fractions | {"per_class": per_class}, **values)
    rows = [f"{step},1,1,0,{3 / step},{1 / step},0.01,9,1" for step in range(20, 61, 20)]
    lines = ["20,9,9,9,9,9,0.01,9,1", *rows, "80,1"]  # a step that was run again after a resume, and an incomplete line
    head = "step,loss,loss_cls,loss_box,loss_pos,loss_neg,lr,positives,grad_norm"
    (cell.folder / "metrics.csv").write_text("\n".join([head, *lines]))


def finish_all(study: Study) -> Study:
    for cell in study.cells:
        write_finished(cell, PERCENT[cell.settings["loss.alpha"]][cell.seed])
    return study


def write_failure(cell: Cell, reason: str) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "failed.txt").write_text(reason)


def report_markdown(study: Study) -> str:
    """Write the report, check what every report must contain, and return report.md."""
    files = write_report(study)
    assert files[0] == study.folder / "report.html" and all(file.stat().st_size for file in files)
    text = (study.folder / "report.md").read_text()
    pictures = [file.name for file in files if file.suffix == ".png"]
    assert re.findall(r"^!\[.+\]\((.+)\)$", text, re.MULTILINE) == pictures
    page = files[0].read_text()
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert not re.search(r"https?:|<script|<link|nan", re.sub(r'src="data:[^"]+"', "", page))
    assert "nan" not in text.lower()
    return text


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading of report.md, without the header."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
