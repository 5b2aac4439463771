"""The page of tools/check_data.py --html, on a small data set with known defects."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from browser import inspect_page, needs_chromium, take_screenshot
from coco_files import write_coco
from page_helpers import check_of, edit, no_progress
from PIL import Image

from retina.check import DataCheck, check_data, write_page
from retina.config import Config

UNSAFE_CLASS = "<script>alert(1)</script> $x"
UNSAFE_FILE = '<b> & "big".png'
WITH_PICTURE = {"box-negative", "box-outside", "box-repeated", "image-size-differs", "image-16-bit"}
WITHOUT_PICTURE = {"image-missing", "image-truncated", "class-in-one-split"}


def break_training(tree: dict[str, Any]) -> None:
    annotations, images = tree["annotations"], tree["images"]
    x, y, w, h = annotations[0]["bbox"]
    annotations[0]["bbox"] = [x + w, y + h, -w, -h]
    annotations.append({**annotations[3], "id": 900})
    outside = [[500, 20, 30, 30], [-1e308, -1e308, 1, 1], [1.7e308, 0, 1.7e308, 9]]  # the last one ends at infinity
    for i, box in enumerate(outside):
        annotations.append({"id": 910 + i, "image_id": images[1]["id"], "category_id": 3, "bbox": box})
    images[4]["width"], images[4]["height"] = 30, 300
    images[5]["file_name"] = UNSAFE_FILE
    tree["categories"].append({"id": 99, "name": UNSAFE_CLASS})
    annotations.append({"id": 920, "image_id": images[5]["id"], "category_id": 99, "bbox": [2, 2, 20, 20]})


class Page(NamedTuple):
    check: DataCheck
    file: Path
    text: str


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path) -> Page:
    root = tmp_path_factory.mktemp("broken")
    write_coco(root, "train", 12, seed=1)
    write_coco(root, "val", 6, seed=2)
    edit(root / "train.json", break_training)
    edit(root / "val.json", lambda tree: tree["categories"].append({"id": 99, "name": UNSAFE_CLASS}))
    folder = root / "train"
    (folder / "0005.png").rename(folder / UNSAFE_FILE)
    (folder / "0006.png").unlink()
    Image.open(folder / "0007.png").save(folder / "0007.png", format="JPEG")
    content = (folder / "0007.png").read_bytes()
    (folder / "0007.png").write_bytes(content[: len(content) // 2])
    gray = np.asarray(Image.open(folder / "0008.png").convert("L")).astype(np.uint16) * 200
    Image.fromarray(gray).save(folder / "0008.png")
    check = check_of(tiny_yaml, root)
    write_page(check, root / "page.html")
    return Page(check, root / "page.html", (root / "page.html").read_text())


def sections(text: str) -> dict[str, str]:
    """The HTML of each finding by its code."""
    parts = text.partition("<h2>Classes")[0].split('<div class="beside"')[1:]
    return {found[1]: part for part in parts if (found := re.search('<h3 id="([^"]+)"', part))}


def jpegs(text: str) -> list[Image.Image]:
    found = re.findall('src="data:image/jpeg;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_every_finding_is_on_the_page_with_its_worst_image(broken: Page) -> None:
    found = sections(broken.text)
    codes = {finding.code for finding in broken.check.findings}
    assert codes == set(found) and codes >= WITH_PICTURE | WITHOUT_PICTURE
    for finding in broken.check.findings:
        assert f'<a href="#{finding.code}">' in broken.text
    for code in WITH_PICTURE:
        (image,) = jpegs(found[code])
        assert 400 <= max(image.size) <= 800, code
    for code in WITHOUT_PICTURE:
        assert not jpegs(found[code]), code
    assert "none of these images can be read" in found["image-missing"]
    assert "none of these images can be read" not in found["class-in-one-split"]
    assert "What to do:</b> Exchange the corners" in found["box-negative"]
    assert "train</td>" in broken.text and "12</td>" in broken.text


def test_names_are_escaped_and_nothing_is_loaded(broken: Page) -> None:
    text = re.sub('src="data:[^"]+"', "", broken.text)
    assert "<script" not in text and "<b> &" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt; &amp; &quot;big&quot;.png" in text
    assert not re.search("https?:|<link|url\\(|@import| src=", text)


def test_sheet_leaves_out_what_cannot_be_read(broken: Page) -> None:
    gallery = broken.text.partition('<div class="gallery">')[2]
    names = re.findall(r"<figcaption>(\S+?\.png): \d+ objects?", gallery)
    assert names and not {"0004.png", "0006.png", "0007.png"} & set(names)
    assert len(jpegs(gallery)) <= 16
    (sentence,) = re.findall("<p>Left out, because they cannot be read: (.*?)</p>", broken.text)
    assert {f"{name}.png:" in sentence for name in ("0004", "0006", "0007")} == {True}, "the size of 0004 differs"


def test_equal_data_give_equal_bytes(broken: Page, tmp_path: Path) -> None:
    write_page(broken.check, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == broken.text
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"], "no temporary file remains"


def test_clean_data(tiny: Config, tmp_path: Path) -> None:
    check = check_data(tiny, True, no_progress)._replace(findings=[])
    write_page(check, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Nothing was found." in text and "No findings" in text
    assert len(jpegs(text)) == 16
    for item in check.advice:
        key, _, value = item.setting.partition("=")
        assert f"  {key.partition('.')[2]}: {value}" in re.findall("<pre>(.*?)</pre>", text, re.DOTALL)[0].split("\n")


def test_refused_file_leaves_the_findings(tiny_yaml: Path, coco_root: Path, tmp_path: Path) -> None:
    shutil.copytree(coco_root, tmp_path / "data")
    (tmp_path / "data/train.json").write_text("{")
    (tmp_path / "data/val.json").write_text("[")
    write_page(check_of(tiny_yaml, tmp_path / "data"), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert list(sections(text)) == ["file-refused"] and "2 errors" in text
    assert re.findall("<h2>(.*?)</h2>", text) == ["Findings"]
    shutil.copy(coco_root / "val.json", tmp_path / "data/val.json")
    write_page(check_of(tiny_yaml, tmp_path / "data"), tmp_path / "page.html")
    assert re.findall("<h2>(.*?)</h2>", (tmp_path / "page.html").read_text()) == ["Findings", "Classes"]


def test_no_objects_and_no_folder(tiny_yaml: Path, coco_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(coco_root, root)
    edit(root / "train.json", lambda tree: tree.update(annotations=[]))
    write_page(check_of(tiny_yaml, root), tmp_path / "page.html")
    headings = re.findall("<h2>(.*?)</h2>", (tmp_path / "page.html").read_text())
    assert headings == ["Findings", "Classes", "What the network gets"]
    shutil.rmtree(root / "train")
    write_page(check_of(tiny_yaml, root), tmp_path / "page.html")
    assert re.findall("<h2>(.*?)</h2>", (tmp_path / "page.html").read_text()) == ["Findings", "Classes"]


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [500, 1300])
def test_page_in_a_browser(broken: Page, tmp_path: Path, width: int) -> None:
    page = inspect_page(broken.text, tmp_path, width)
    assert len(page["images"]) > len(WITH_PICTURE) + 3 and all(page["images"])
    assert len(page["links"]) == len(broken.check.findings) and all(page["links"])
    assert page["title"] == "Data check"
    with Image.open(take_screenshot(broken.file, tmp_path, width)) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (2000, width)
    for part in np.array_split(pixels, 4):
        assert (part < 250).mean() > 0.005, "no part of the page is blank"
