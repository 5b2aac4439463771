"""tools/eval.py --report on detections in a file: the page, its data, and what is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pytest
from browser import inspect_page, needs_chromium, print_to_pdf, take_screenshot
from command_helpers import run_main
from PIL import Image

from retina.config import COCO_METRICS

UNSAFE_CLASS = "<script>alert(1)</script> $x"
UNSAFE_FILE = 'a & "b" #1.png'
HEADINGS = ["Average precision", "Where the AP is lost", "At which score to use it", "What is confused with what",
            "Which objects are found", "Are the scores probabilities?", "The worst errors", "Data"]  # fmt: skip


def make_detections(truth: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Most objects with shifted boxes, some with a wrong class, a duplicate, or missed; and boxes of nothing."""
    rng = np.random.default_rng(seed)
    ids = [category["id"] for category in truth["categories"]]
    results = []
    for annotation in truth["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            x, y, w, h = annotation["bbox"]
            dx, dy = rng.normal(0, 0.15, 2) * (w, h)
            category = int(rng.choice(ids)) if rng.random() < 0.3 else annotation["category_id"]
            box = [round(float(v), 2) for v in (x + dx, y + dy, w, h)]
            found = {"image_id": annotation["image_id"], "category_id": category}
            results.append({**found, "bbox": box, "score": round(float(rng.uniform(0.3, 0.95)), 4)})
    for image in truth["images"]:
        for _ in range(6):
            x, y, w, h = rng.uniform(2, 30, 4).round(2).tolist()
            found = {"image_id": image["id"], "category_id": int(rng.choice(ids)), "bbox": [x, y, w, h]}
            results.append({**found, "score": round(float(rng.uniform(0.05, 0.5)), 4)})
    return results


class Written(NamedTuple):
    folder: Path
    page: str
    data: dict[str, Any]
    metrics: dict[str, Any]
    output: str


def write_report(yaml: Path, data: Path, folder: Path, detections: Any) -> Written:
    file = folder / "found.json"
    file.write_text(detections if isinstance(detections, str) else json.dumps(detections))
    paths = [f"data.val_annotations={data}/val.json", f"data.val_images={data}/val"]
    done = run_main("eval.py", yaml, *paths, "--report", "--detections", file, "--output", folder / "out")
    assert done.returncode == 0, done.stderr
    texts = [(folder / "out" / name).read_text() for name in ("report.html", "report.json", "metrics.json")]
    return Written(folder / "out", texts[0], json.loads(texts[1]), json.loads(texts[2]), done.stdout)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path, coco_root: Path) -> Written:
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(coco_root, root / "data")
    truth = json.loads((root / "data/val.json").read_text())
    truth["categories"][1]["name"] = UNSAFE_CLASS
    truth["categories"].append({"id": 99, "name": "never there"})
    (root / "data/val" / truth["images"][0]["file_name"]).rename(root / "data/val" / UNSAFE_FILE)
    truth["images"][0]["file_name"] = UNSAFE_FILE
    (root / "data/val.json").write_text(json.dumps(truth))
    return write_report(tiny_yaml, root / "data", root, make_detections(truth))


def test_numbers_are_those_of_the_evaluation(written: Written) -> None:
    """metrics.json is written by pycocotools, the report by our own matching."""
    rows = {row["metric"]: row for row in written.data["coco"]}
    assert list(rows) == list(COCO_METRICS)
    for name in COCO_METRICS:
        assert rows[name]["value"] == written.metrics[name]
        if rows[name]["value"] is not None:
            assert rows[name]["low"] <= rows[name]["value"] <= rows[name]["high"]
    assert {row["class"]: row["AP"] for row in written.data["classes"]} == pytest.approx(written.metrics["per_class"])
    assert f">{100 * written.metrics['AP']:.1f}</td>" in written.page
    thresholds = {row["class"]: row["score"] for row in written.data["thresholds"]}
    assert thresholds.pop("all") == written.metrics["score_threshold"]["all"]
    assert thresholds == written.metrics["score_threshold"]["per_class"]
    assert thresholds["never there"] is None and thresholds["red"] is not None


def test_summary(written: Written) -> None:
    sure, lost, use = written.data["summary"]
    assert f"AP is {100 * written.metrics['AP']:.1f} on 10 images" in sure
    kinds = {row["kind"]: row["lost_AP50"] for row in written.data["lost_ap"] if row["class"] == "all"}
    assert f"{100 * max(kinds.values()):.1f} points" in lost and len(kinds) == 6
    assert f"at least {written.metrics['score_threshold']['all']!r}:" in use
    assert written.data["commands"] == [] and "<pre>" not in written.page, "there is no detector"
    assert written.output.rstrip().endswith("report.html")


def test_every_table_is_json_and_csv(written: Written) -> None:
    tables = {
        name: rows for name, rows in written.data.items() if name not in ("summary", "source", "error", "commands")
    }
    files = {file.stem: file for file in (written.folder / "report").iterdir()}
    assert set(tables) == set(files)
    for name, rows in tables.items():
        in_file = list(csv.DictReader(io.StringIO(files[name].read_text())))
        assert len(in_file) == len(rows) > 0
        for row, cells in zip(rows, in_file, strict=True):
            assert {key: "" if value is None else str(value) for key, value in row.items()} == {
                key: cells[key] for key in row
            }
        assert f"report/{name}.csv" in written.page
    assert "NaN" not in (written.folder / "report.json").read_text()


def test_confusion_and_recall_agree_with_the_threshold(written: Written) -> None:
    best = written.data["thresholds"][0]
    confusion = {(row["object"], row["detected"]): row["count"] for row in written.data["confusion"]}
    assert sum(count for (true, found), count in confusion.items() if true == found) == best["right"]
    objects = sum(row["objects"] for row in written.data["classes"])
    assert best["right"] + best["missed"] == objects
    for title in {row["property"] for row in written.data["recall"]}:
        rows = [row for row in written.data["recall"] if row["property"] == title]
        assert sum(row["objects"] for row in rows) == objects
        assert sum(row["found"] for row in rows) == best["right"]
    assert sum(row["detections"] for row in written.data["images"]) == best["right"] + best["wrong"]


def test_gallery_shows_the_worst(written: Written) -> None:
    galleries = written.page.split('<div class="gallery">')[1:]
    kinds = ["background", "missed", "class", "location", "duplicate"]
    by_kind = {kind: [row for row in written.data["gallery"] if row["gallery"] == kind] for kind in kinds}
    assert len(galleries) == len(kinds) and all(0 < len(rows) <= 12 for rows in by_kind.values())
    for gallery, (kind, rows) in zip(galleries, by_kind.items(), strict=True):
        gallery = gallery.partition("</div>")[0]
        targets = re.findall('<a href="([^"]+)">', gallery)
        assert len(targets) == gallery.count("data:image/jpeg") == len(rows), kind
        for target, row in zip(targets, rows, strict=True):
            path = written.folder / unquote(target)
            assert path.is_file() and path.name == row["file"]
        scores = [row["score"] for row in rows]
        sizes = [float(np.prod(row["object_bbox"][2:])) if row["object_bbox"] else 0 for row in rows]
        order = sizes if kind == "missed" else scores
        assert order == sorted(order, reverse=True) and len(set(order)) > 1
    for data in re.findall('src="data:image/jpeg;base64,([^"]+)"', written.page):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) == 480


def test_names_are_escaped_and_nothing_is_loaded(written: Written) -> None:
    text = re.sub('src="data:[^"]+"', "", written.page)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "a &amp; &quot;b&quot; #1.png</a>" in text and 'a%20%26%20%22b%22%20%231.png">' in text
    assert not re.search("https?:|<link|url\\(|@import| src=", text)
    assert re.findall("<h2>(.*?)</h2>", text) == HEADINGS


def test_equal_data_give_equal_bytes(written: Written, tiny_yaml: Path, tmp_path: Path) -> None:
    """But for the paths in the source, the commands and the links."""
    data = written.folder.parent / "data"
    again = write_report(tiny_yaml, data, tmp_path, (written.folder.parent / "found.json").read_text())
    places = '<p>[^<]*found.json[^<]*</p>|<pre>.*?</pre>|href="[^"]*"'
    pages = (re.sub(places, "", page) for page in (written.page, again.page))
    assert len(set(pages)) == 1


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [500, 1300])
def test_page_in_a_browser(written: Written, tmp_path: Path, width: int) -> None:
    page = inspect_page(written.page, tmp_path, width)
    assert len(page["images"]) == 8 + len(written.data["gallery"]) and all(page["images"])
    assert page["title"] == "Report of the evaluation"
    with Image.open(take_screenshot(written.folder / "report.html", tmp_path, width)) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (2000, width)
    for part in np.array_split(pixels, 4):
        assert (part < 250).mean() > 0.005, "no part of the page is blank"


@pytest.mark.slow
@needs_chromium
def test_page_on_paper(written: Written, tmp_path: Path) -> None:
    content = print_to_pdf(written.folder / "report.html", tmp_path).read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert content.startswith(b"%PDF") and pages > 1 and len(content) > 100_000, (pages, len(content))


def test_nothing_found(coco_root: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    empty = write_report(tiny_yaml, coco_root, tmp_path, [])
    assert empty.metrics["AP"] == 0 and empty.metrics["score_threshold"]["all"] is None
    assert "no threshold to recommend" in empty.data["summary"][-1] and "<pre>" not in empty.page
    assert {row["kind"] for row in empty.data["gallery"]} == {"missed"}


def test_nothing_there(coco_root: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    shutil.copytree(coco_root, tmp_path / "data")
    truth = json.loads((tmp_path / "data/val.json").read_text())
    results = make_detections(truth)
    (tmp_path / "data/val.json").write_text(json.dumps({**truth, "annotations": []}))
    page = write_report(tiny_yaml, tmp_path / "data", tmp_path, results)
    assert page.metrics["AP"] is None and "There are no objects" in page.data["summary"][0]
    assert {row["kind"] for row in page.data["gallery"]} == {"background"}


def test_images_that_cannot_be_read_are_named_instead_of_drawn(
    coco_root: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    shutil.copytree(coco_root, tmp_path / "data")
    truth = json.loads((tmp_path / "data/val.json").read_text())
    for image in truth["images"][1:]:
        (tmp_path / "data/val" / image["file_name"]).write_bytes(b"no image")
    page = write_report(tiny_yaml, tmp_path / "data", tmp_path, make_detections(truth))
    assert re.search("<p>Not drawn: .*not readable as an image", page.page)
    shown = {row["file"] for row in page.data["gallery"]} - {image["file_name"] for image in truth["images"][1:]}
    assert shown == {truth["images"][0]["file_name"]} and "data:image/jpeg" in page.page


def test_scores_and_boxes_out_of_range(coco_root: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    """Logits instead of scores, and boxes far outside of the image, are scored; the calibration is left out."""
    truth = json.loads((coco_root / "val.json").read_text())
    results = [{**entry, "score": 10 * entry["score"] - 4} for entry in make_detections(truth)]
    results[0]["bbox"], results[1]["bbox"], results[2]["bbox"] = [-1e5, -1e5, 1, 1], [0, 0, 1e300, 1e300], [5, 5, -9, 0]
    for entry in results[:3]:
        entry["score"] = 9.5
    page = write_report(tiny_yaml, coco_root, tmp_path, results)
    assert "their scores are not between 0 and 1" in page.page and page.data["calibration"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 123456}, "image_id 123456"),
        ({"category_id": 5}, "category_id 5"),
        ({"score": float("nan")}, "NaN"),
        ({"bbox": [1, 2, float("inf"), 4]}, "Infinity"),
        ({"score": "high"}, "score"),
        ({"bbox": [1, 2, 3]}, "bbox"),
    ],
)
def test_detections_that_cannot_be_scored(
    coco_root: Path, tiny_yaml: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    results = make_detections(json.loads((coco_root / "val.json").read_text()))
    results[3] |= change
    file = tmp_path / "found.json"
    file.write_text(json.dumps(results))
    done = run_main("eval.py", tiny_yaml, "--report", "--detections", file, "--output", tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.startswith(f"error: {file}: ") and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["", "  \n", "{}", "[1]", "\0", None])
def test_files_that_are_no_detections(tiny_yaml: Path, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "found.json"
    if content is not None:
        file.write_text(content)
    done = run_main("eval.py", tiny_yaml, "--report", "--detections", file)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {file}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"] * (content is not None)


def test_one_image_has_no_interval(coco_root: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    shutil.copytree(coco_root, tmp_path / "data")
    truth = json.loads((tmp_path / "data/val.json").read_text())
    image = truth["annotations"][0]["image_id"]
    truth["images"] = [entry for entry in truth["images"] if entry["id"] == image]
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] == image]
    (tmp_path / "data/val.json").write_text(json.dumps(truth))
    page = write_report(tiny_yaml, tmp_path / "data", tmp_path, make_detections(truth))
    assert "nan" not in page.data["summary"][0] and "These images do not show how far" in page.data["summary"][0]


def test_two_classes_with_one_name(coco_root: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    shutil.copytree(coco_root, tmp_path / "data")
    truth = json.loads((tmp_path / "data/val.json").read_text())
    for category in truth["categories"]:
        category["name"] = "cell"
    (tmp_path / "data/val.json").write_text(json.dumps(truth))
    page = write_report(tiny_yaml, tmp_path / "data", tmp_path, make_detections(truth))
    names = [f"cell (id {category['id']})" for category in truth["categories"]]
    assert list(page.metrics["per_class"]) == list(page.metrics["score_threshold"]["per_class"]) == names
    assert all(f">{name}</td>" in page.page for name in names)


def test_an_output_that_is_no_folder(coco_root: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("[]")
    (tmp_path / "file").write_text("")
    for output, message in (("file", "is a file, expected a folder"), ("file/out", "Not a directory")):
        arguments = ["--detections", tmp_path / "found.json", "--output", tmp_path / output]
        done = run_main("eval.py", tiny_yaml, *arguments)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and message in done.stderr


def test_detections_need_no_detector(tiny_yaml: Path, tmp_path: Path) -> None:
    done = run_main("eval.py", tiny_yaml, "--detections", tmp_path / "found.json", "--time")
    assert done.returncode == 2 and "--detections" in done.stderr and "--time" in done.stderr
