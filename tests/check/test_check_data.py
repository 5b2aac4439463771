"""The whole check: data without defects, exit statuses, headers and pixels, and what is left untouched."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_helpers import HEIGHT, WIDTH, Data, check, content
from coco_files import write_coco
from command_helpers import run_main
from image_plants import PLANTS
from PIL import Image

from retina.check import data_check, format_check, quick_check
from retina.check.data_check import DataCheck
from retina.config_file import load_config
from retina.convert.voc import convert_voc
from retina.data.coco import CocoDataset
from retina.shapes.settings import ShapesSettings
from retina.shapes.writing import write_shapes

ROOT = Path(__file__).parents[2]
BCCD = next(
    (path for path in (ROOT / "data/BCCD_Dataset/BCCD", ROOT.parent / "shared/data/BCCD") if path.is_dir()), None
)


def codes(result: DataCheck) -> list[str]:
    return [finding.code for finding in result.findings]


def test_clean_data_has_no_finding_and_is_not_changed(clean_root: Path) -> None:
    before = content(clean_root)
    result = run_main("check_data.py", clean_root / "config.yaml")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("train: 24 images, 72 objects, 4 classes, 3 crowd regions")
    assert lines[2] == "every image decoded; no findings"
    assert "Advice" not in result.stdout
    assert content(clean_root) == before


def test_generated_data_has_no_finding(tmp_path: Path) -> None:
    write_shapes(tmp_path, ShapesSettings(train=60, val=20, size=128), 1)
    paths = [f"data.{s}_annotations={tmp_path}/annotations/{s}.json" for s in ("train", "val")]
    paths += [f"data.{s}_images={tmp_path}/{s}" for s in ("train", "val")]
    result = check(load_config(ROOT / "configs/shapes.yaml", [*paths, "data.short_side=[128]"]))
    assert not result.findings, format_check(result)


@pytest.mark.slow
@pytest.mark.skipif(BCCD is None, reason="no BCCD images: neither data/BCCD_Dataset/BCCD nor ../shared/data/BCCD")
def test_blood_cells_have_no_finding(tmp_path: Path) -> None:
    assert BCCD is not None
    paths = [f"data.{split}_images={BCCD / 'JPEGImages'}" for split in ("train", "val")]
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(convert_voc(BCCD, split)[0]))
        paths.append(f"data.{split}_annotations={tmp_path / split}.json")
    result = check(load_config(ROOT / "configs/bccd.yaml", paths))
    assert not result.findings and not result.advice, format_check(result)


def test_exit_status_and_the_order_of_findings(data: Data) -> None:
    data.train.take_object()["id"] = 0  # a note
    data.train.take_object()["bbox"][2] = 0  # a warning
    data.write()
    result = run_main("check_data.py", data.root / "config.yaml")
    assert result.returncode == 0 and "every image decoded; 1 warning, 1 note" in result.stdout
    data.train.take_object()["bbox"][2] = -5  # an error
    data.write()
    result = run_main("check_data.py", data.root / "config.yaml")
    assert result.returncode == 1 and "every image decoded; 1 error, 1 warning, 1 note" in result.stdout
    headings = [line.split()[0] for line in result.stdout.splitlines() if line[:4] in ("ERRO", "WARN", "NOTE")]
    assert headings == ["ERROR", "WARNING", "NOTE"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such"),
        (["CONFIG", "data.short_sides=[3]"], "unknown key data.short_sides"),
        (["CONFIG", "data.val_annotations=nowhere.json"], "data.val_annotations: no file nowhere.json"),
        (["CONFIG", "--html", "nowhere/page.html"], "--html: no folder nowhere"),
        (["CONFIG", "--pixels", "--no-pixels"], "not allowed with"),
    ],
)
def test_a_check_that_cannot_run_exits_with_2(clean_root: Path, arguments: list[str], message: str) -> None:
    result = run_main("check_data.py", *[str(clean_root / "config.yaml") if a == "CONFIG" else a for a in arguments])
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""


def test_data_without_training_objects_is_refused(data: Data) -> None:
    data.train.tree["annotations"] = []
    data.write()
    result = check(data.config())
    assert codes(result)[0] == "file-refused" and "no objects to train on" in result.findings[0].examples[0].text
    result = check(data.config("data.empty_images=drop"))
    refusals = [finding.examples[0].text for finding in result.findings if finding.code == "file-refused"]
    assert len(refusals) == 2 and "no objects to train on" in refusals[0] and "no images to use" in refusals[1]


def change(data: Data, *names: str) -> None:
    """Plant all defects of these codes."""
    for plant in PLANTS:
        if plant.code in names:
            plant.change(data)
    data.write()


@pytest.mark.parametrize("code", ["image-cmyk", "image-size-differs", "image-exif-rotation", "image-bytes-repeated"])
def test_without_pixels_the_defects_of_headers_are_found(data: Data, code: str) -> None:
    change(data, code)
    assert set(codes(check(data.config(), pixels=False))) == {code}


def test_without_pixels_defects_of_pixels_are_not_found(data: Data) -> None:
    change(data, "image-truncated", "image-constant", "image-near-duplicate")
    result = run_main("check_data.py", data.root / "config.yaml", "--no-pixels")
    assert result.returncode == 0
    assert "headers of the images read; --pixels decodes them too; no findings" in result.stdout


def test_pixels_that_are_not_a_number_are_found(data: Data) -> None:
    values = np.full((HEIGHT, WIDTH), 99, np.float32)
    values[:3, 5] = np.nan
    image = data.train.take(".png")
    Image.fromarray(values).save(data.train.path(image), "TIFF")
    (finding,) = check(data.config(), pixels=True).findings
    assert finding.code == "image-truncated"
    assert finding.examples[0].text.endswith(": 3 of 12,288 pixels are not a number (NaN); set them to one, such as 0")


def test_without_pixels_no_pixel_is_decoded(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    change(data, "image-animated", "image-alpha", "image-16-bit")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert set(codes(check(data.config(), pixels=False))) >= {"image-animated", "image-alpha", "image-16-bit"}
    assert "image-truncated" in codes(check(data.config(), pixels=True))


@pytest.mark.parametrize(("below", "flags", "decoded"), [(36, [], False), (37, [], True), (36, ["--pixels"], True)])
def test_pixels_are_read_by_default_below_a_number_of_images(
    clean_root: Path, monkeypatch: pytest.MonkeyPatch, below: int, flags: list[str], decoded: bool
) -> None:
    monkeypatch.setattr(data_check, "PIXELS_BELOW", below)
    result = run_main("check_data.py", clean_root / "config.yaml", *flags)
    assert ("every image decoded" in result.stdout) is decoded


def test_progress_is_shown_in_a_terminal_only(clean_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    result = run_main("check_data.py", clean_root / "config.yaml")
    assert "24/24" in result.stderr and "12/12" in result.stderr and "24/24" not in result.stdout


def test_the_progress_bar_gets_the_number_of_images(data: Data) -> None:
    totals = []

    def progress(iterable: Iterable[Any], total: int) -> Iterable[Any]:
        totals.append(total)
        return iterable

    data_check.check_data(data.config(), False, progress)
    assert totals == [24, 12, 24]  # the last for the anchors


def test_control_characters_in_names_do_not_reach_the_terminal(data: Data) -> None:
    data.rename_category("cat", "\x1b[31mred\n")
    data.write()
    assert "\x1b" not in run_main("check_data.py", data.root / "config.yaml").stdout


def open_both(data: Data) -> tuple[CocoDataset, CocoDataset]:
    return CocoDataset(data.train.file, data.train.folder), CocoDataset(data.val.file, data.val.folder)


def test_the_quick_check_reports_errors_only(data: Data) -> None:
    data.train.take_object()["bbox"][2] = 0  # a warning
    data.write()
    assert quick_check(*open_both(data), data.config()) == []
    image = data.val.take()
    data.val.path(image).unlink()
    found = quick_check(*open_both(data), data.config())
    assert [str(finding) for finding in found] == [
        f"error image-missing in val: image files that do not exist (1): image {image['id']} ({image['file_name']})"
    ]
    assert quick_check(*open_both(data), data.config("data.unreadable=skip")) == []


def test_the_quick_check_opens_a_sample_of_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 25), ("val", 7)):
        write_coco(tmp_path, split, count, seed=1)
    train, val = (CocoDataset(tmp_path / f"{split}.json", tmp_path / split) for split in ("train", "val"))
    opened: list[str] = []
    image_open = Image.open
    monkeypatch.setattr(
        Image, "open", lambda path: (opened.append(f"{path.parent.name} {path.name}"), image_open(path))[1]
    )
    monkeypatch.setattr(data_check, "SAMPLE", 9)
    quick_check(train, val, load_config(ROOT / "configs/bccd.yaml"))
    assert sorted(opened) == [f"train {i * 25 // 9:04}.png" for i in range(9)] + [f"val {i:04}.png" for i in range(7)]


def test_a_page_replaces_no_other_file(data: Data) -> None:
    before = data.train.file.read_bytes()
    result = run_main("check_data.py", data.root / "config.yaml", "--html", data.train.file)
    assert result.returncode == 2 and "exists and is not a page" in result.stderr
    assert data.train.file.read_bytes() == before
    page = data.root / "page.html"
    for _ in range(2):
        assert run_main("check_data.py", data.root / "config.yaml", "--html", page).returncode == 0
