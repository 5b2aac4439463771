"""The tables of the report of a study: numbers worked out by hand, at every stage of a study."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from report_helpers import (
    ALPHAS,
    GRID,
    ONE_SEED,
    PERCENT,
    THREE_SEEDS,
    UNSAFE_NAME,
    finish_all,
    report_markdown,
    table_rows,
    write_failure,
    write_finished,
    write_result,
    write_study,
)

from retina.config import COCO_METRICS
from retina.study.report import terminal_table, write_report
from retina.study.study_file import load_study


def test_numbers_by_hand(tmp_path: Path) -> None:
    """Squares 2, 2, 8, 0 over 8 degrees of freedom: s = sqrt(1.5), and s * sqrt(2/3) = 1, so the bound is t = 2.306."""
    text = report_markdown(finish_all(write_study(tmp_path, ALPHAS + THREE_SEEDS)))
    others = ["50.0 ± 0.0", "25.0 ± 0.0"]
    assert table_rows(text, "Average precision") == [
        ["0.25", "3/3", "0.5 ± 0.1", *others, "10.8", "-35.5", "worse"],
        ["0.5", "3/3", "31.0 ± 1.0", *others, "30.2", "-5.0", "worse"],
        ["0.75", "3/3", "34.0 ± 1.0", *others, "31.1", "-2.0", "within noise of best"],
        ["0.9", "3/3", "33.5 ± 2.0", *others, "30.8", "-2.5", "worse"],
        [f"**{entry}**" if entry else "" for entry in ["0.99", "3/3", "36.0 ± 0.0", *others, "28.7", "", "best"]],
    ]
    assert "pooled over 4 cells with an AP of at least 1 percent, is s = 1.22 percent AP (8 degrees of freedom)" in text
    assert "Two means of 3 seeds must differ by more than 2.31 to exceed it" in text
    with (tmp_path / "out/study-base/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["exceeds_noise"] for row in rows] == ["True", "True", "False", "True", ""]
    expected = {"loss.alpha": "0.5", "seeds": "3", "diverged": "0", "AP_mean": "31.0", "AP_sd": "1.0",
                "AP50_mean": "50.0", "paper_AP": "30.2", "to_best": "-5.0"}  # fmt: skip
    assert rows[1].items() >= expected.items()
    # 7 of 10 pairs have the order of the paper; two pairs, 0.5 and 2.0 apart, are within the noise
    assert (
        "Order compared with the paper: Kendall tau 0.40 over 5 cells (1 same order, -1 reversed); 8 of their 10 pairs "
        "differ here by more than the noise, 6 of these in the same direction as in the paper."
    ) in text
    assert "study.yaml varies loss.alpha 0.25, 0.5, 0.75, 0.9, 0.99." in text
    assert "60 steps of 8 images, 2 training images and 2 validation images, seeds 0, 1, 2." in text
    assert "15 of 15 runs are done; 0 diverged, 0 failed." in text


def test_settings_of_the_command_line_are_named_and_in_the_command_to_run_it_again(tmp_path: Path) -> None:
    study = write_study(tmp_path, "axes: {loss.gamma: [0, 1]}\n")
    study = load_study(study.file, None, ["train.compile=true", "loss.alpha=0.5"], study.folder.parent)
    text = report_markdown(study)
    assert f"{tmp_path}/base.yaml with train.compile=true loss.alpha=0.5: 60 steps" in text
    command = (
        f"python tools/ablate.py {tmp_path}/study.yaml train.compile=true loss.alpha=0.5 --base {tmp_path}/base.yaml"
        f" --output {study.folder.parent}"
    )
    assert f"    {command}\n" in text


def test_different_data(tmp_path: Path) -> None:
    """On different validation images no cell is best; the numbers of both training sets are named."""
    study = write_study(tmp_path, ALPHAS + THREE_SEEDS)
    small = tmp_path / "small.json"
    tree = json.loads((tmp_path / "train.json").read_text(encoding="utf-8-sig"))
    small.write_text(json.dumps(tree | {"images": tree["images"][:1]}))  # without the image that has no objects
    for split, expected in (("train", "1 or 2 training images and 2 val"), ("val", "2 training images and 1 or 2 val")):
        axes = f"{{data.{split}_annotations: [{small}, {tmp_path}/{split}.json]}}"
        study = write_study(tmp_path, f"axes: {axes}\nseeds: [0, 1]\n")
        for cell, percent in zip(study.cells, (40, 30, 41, 31), strict=True):
            write_finished(cell, percent)
        markdown = report_markdown(study)
        assert expected in markdown
        remarks = [row[-1].strip("*") for row in table_rows(markdown, "Average precision")]
        assert remarks == (["best", "worse"] if split == "train" else ["", ""])


def test_seeds_without_any_noise_decide_nothing(tmp_path: Path) -> None:
    study = write_study(tmp_path, "axes: {loss.gamma: [0, 1]}\nseeds: [0, 1]\n")
    for cell in study.cells:
        write_finished(cell, 20 + 10 * cell.settings["loss.gamma"])
    assert [row[-1].strip("*") for row in table_rows(report_markdown(study), "Average precision")] == ["", "best"]


def test_a_run_without_objects_to_find_is_not_waiting(tmp_path: Path) -> None:
    study = write_study(tmp_path, "axes: {loss.gamma: [0, 1]}\n")
    write_result(study.cells[0], metrics=dict.fromkeys(COCO_METRICS) | {"per_class": {}})
    assert [row[-1] for row in table_rows(report_markdown(study), "Average precision")] == ["no AP", "waiting"]


def test_bound_depends_on_the_finished_seeds(tmp_path: Path) -> None:
    """Two groups of two seeds, one of one: s = sqrt(2), df 2, t = 4.303; bounds 6.08 (2 and 2) and 7.45 (1 and 2)."""
    study = write_study(tmp_path, "axes: {loss.gamma: [0, 1, 2]}\nseeds: [0, 1]\n")
    given = {(0, 0): 40, (0, 1): 42, (1, 0): 34.5, (1, 1): 36.5, (2, 0): 34}  # means 41, 35.5, 34
    for cell in study.cells:
        if (percent := given.get((cell.settings["loss.gamma"], cell.seed))) is not None:
            write_finished(cell, percent)
    table = table_rows(text := report_markdown(study), "Average precision")
    assert [row[-1] for row in table] == ["**best**", "within noise of best", "within noise of best"]
    assert [row[1] for row in table] == ["**2/2**", "2/2", "1/2"] and table[2][2] == "34.0"
    assert "s = 1.41 percent AP (2 degrees of freedom). Two means of 2 seeds must differ by more than 6.08" in text
    write_finished(study.cells[2], 33.5)  # 7.5 below
    assert [row[-1] for row in table_rows(report_markdown(study), "Average precision")] == [
        "**best**",
        "within noise of best",
        "worse",
    ]


def test_no_run_has_finished(tmp_path: Path) -> None:
    study = write_study(tmp_path, GRID + THREE_SEEDS)
    text = report_markdown(study)
    assert all(row[2:] == ["0/3", "-", "-", "-", "", "waiting"] for row in table_rows(text, "Average precision"))
    assert "0 of 18 runs are done; 0 diverged, 0 failed." in text and "noise" not in text and "![" not in text
    assert [row[3] for row in table_rows(text, "All runs")] == ["waiting"] * 18
    assert "\n| ---: | ---: | ---: | --- | --- | --- | --- | --- |\n" in text, "folder names are aligned left"


def test_one_seed_marks_no_difference(tmp_path: Path) -> None:
    study = write_study(tmp_path, ALPHAS + ONE_SEED)
    for cell in study.cells[1:]:
        write_finished(cell, PERCENT[cell.settings["loss.alpha"]][0])
    text = report_markdown(study)
    assert [row[-1] for row in table_rows(text, "Average precision")] == ["waiting", "", "", "", "**best**"]
    assert "One seed: the seed noise is unknown, so no difference is marked." in text and "±" not in text
    assert "Kendall tau 0.00 over 4 cells" in text and "pairs" not in text
    assert "seed 0. 4 of 5 runs are done; 0 diverged, 0 failed." in text


def test_diverged_failed_and_waiting_together(tmp_path: Path) -> None:
    study = write_study(tmp_path, GRID + THREE_SEEDS)
    cells = {(c.settings["loss.gamma"], c.settings["loss.alpha"], c.seed): c for c in study.cells}
    for seed in range(3):
        write_result(cells[0, 0.25, seed], diverged=7 + seed)
        write_finished(cells[1, 0.25, seed], 30 + seed)
    write_result(cells[0, 0.75, 0], diverged=1)
    write_result(cells[0, 0.75, 1], diverged=1)
    write_finished(cells[0, 0.75, 2], 30.5)  # not compared with the best cell, because the other seeds diverged
    write_finished(cells[2, 0.25, 0], 20)
    write_failure(cells[2, 0.25, 1], f"No {UNSAFE_NAME}\nafter 3 trials")
    write_failure(cells[1, 0.25, 0], "finished later")
    text = report_markdown(study)
    assert "10 of 18 runs are done; 5 diverged, 1 failed." in text
    table = {(row[0], row[1]): row for row in table_rows(text, "Average precision")}
    assert table["0", "0.25"][2:] == ["0/3", "-", "-", "-", "", "diverged"]
    assert table["0", "0.75"][2:] == ["1/3", "30.5", "50.0", "25.0", "-0.5", "2 of 3 diverged"]
    assert table["2", "0.25"][-1] == "worse; 1 of 3 failed" and table["2", "0.75"][-1] == "waiting"
    failures = table_rows(text, "Diverged and failed")
    assert len(failures) == 6 and failures[0] == [
        "gamma 0, alpha 0.25, seed 0", "diverged at step 7", f"../cells/{cells[0, 0.25, 0].key}/log.txt"
    ]  # fmt: skip
    assert [row[1] for row in failures if "gamma 2" in row[0]] == [r"No a\<b\|c $1\_$2\_ after 3 trials"]
    assert (study.folder / failures[0][2]).parent.resolve() == cells[0, 0.25, 0].folder.resolve()
    page = (study.folder / "report.html").read_text()
    assert "No a&lt;b|c" in page and UNSAFE_NAME not in page
    assert "![AP over gamma and alpha, as colors](heat_map.png)" in text


def test_csv_has_every_run(tmp_path: Path) -> None:
    text = "axes: {data.short_side: [[400], [500]], loss.cls: [focal, ohem], loss.alpha: [null]}\nseeds: [3, 1]\n"
    study = write_study(tmp_path, text + "paper: [table1e, section4_1]\n")
    first, second, third = study.cells[:3]
    write_finished(first, 25, milliseconds=7.5)
    write_result(second, diverged=5)
    write_failure(third, "no memory")
    write_report(study)
    raw = (study.folder / "trainings.csv").read_bytes()
    rows = list(csv.DictReader(raw.decode().splitlines()))
    assert b"\r" not in raw and len(rows) == 8
    assert list(rows[0]) == [
        "data.short_side", "loss.cls", "loss.alpha", "seed", "key", "status", *COCO_METRICS, "milliseconds", "seconds"
    ]  # fmt: skip
    assert [row["status"] for row in rows] == ["finished", "diverged", "failed"] + ["waiting"] * 5
    assert [row["key"] for row in rows] == [cell.key for cell in study.cells]
    expected = {"data.short_side": "[400]", "loss.cls": "focal", "loss.alpha": "null", "seed": "3", "AP": "0.25",
                "AP50": "0.5", "APs": "", "milliseconds": "7.5", "seconds": "12.5"}  # fmt: skip
    assert rows[0].items() >= expected.items()
    assert rows[1]["AP"] == rows[1]["milliseconds"] == "" and rows[1]["seconds"] == "12.5"
    speed = table_rows((study.folder / "report.md").read_text(), "Speed")
    assert speed[0] == ["400", "focal", "none", "25.0", "7.5", "30.5", "64.0"]


def test_terminal_table_is_aligned_and_fits(tmp_path: Path) -> None:
    study = write_study(tmp_path, GRID + "set: {loss.cls: focal}\npaper: [table1a, table1b]\n" + THREE_SEEDS)
    for cell in study.cells[:10]:
        write_finished(cell, 30 + cell.seed)
    for cell in study.cells[10:12]:
        write_result(cell, diverged=1)
    lines = terminal_table(study).splitlines()
    assert len(lines) == 7 and max(map(len, lines)) <= 100
    assert lines[0].split() == ["gamma", "alpha", "seeds", "AP", "AP50", "AP75", "paper", "AP", "vs", "best"]
    assert lines[1].split() == ["0", "0.25", "2/3", "30.5", "±", "0.7", "50.0", "25.0", "10.8", "best"]
    assert {line.index("/3") for line in lines[1:]} == {lines[0].index("seeds") + 1}
    assert lines[5].endswith("1 of 3 diverged")
