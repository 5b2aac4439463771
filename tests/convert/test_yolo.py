"""YOLO -> COCO: the lines of label files, and the images. The expected boxes are computed by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from yolo_helpers import BOX, PIXELS, boxes, one_image, write

from retina.convert.yolo import convert_yolo
from retina.data.coco import read_image

LINES = {
    "a box": ("1 0.5 0.5 0.5 0.2", [PIXELS], ""),
    "class 0.0, exponents, tabs": ("0.0\t5e-1 .5  5.0E-1\t0.2", [PIXELS], ""),
    "a confidence": ("0 0.5 0.5 0.5 0.2 0.875", [PIXELS], "1 lines have a confidence, which is not used"),
    # x from 0.1 to 0.6 of 40, y from 0.2 to 0.9 of 30
    "a triangle": ("0 0.1 0.2 0.6 0.3 0.2 0.9", [[4, 6, 20, 21]], "1 polygons became boxes"),
    "an oriented box": ("0 0.5 0.1 0.75 0.3 0.5 0.5 0.25 0.3", [[10, 3, 20, 12]], "1 polygons became boxes"),
    "a box and a polygon": (f"{BOX}\n0 0 0 1 0 1 1", [PIXELS, [0, 0, 40, 30]], "1 polygons became boxes"),
    "empty lines, BOM, CRLF": (b"\xef\xbb\xbf\r\n0 0.5 0.5 0.5 0.2\r\n\r\n", [PIXELS], ""),
    "UTF-16 of Windows": (BOX.encode("utf-16"), [PIXELS], ""),
    "a repeated line": (f"{BOX}\n{BOX}\n1{BOX[1:]}", [PIXELS, PIXELS], "1 lines repeat another line"),
    "empty": ("", [], ""),
    "rounded beyond 0 and 1": ("0 0.5 0.5 1.000001 1", [[0, 0, 40, 30]], ""),
    "0.4 pixels outside": ("0 0.25 0.5 0.52 0.2", [[0, 12, 20.4, 6]], ""),
    "4 pixels outside": ("0 0.9 0.5 0.4 0.2", [[28, 12, 12, 6]], r"clipped: .*a\.txt, line 1 \('dog'\), box \(28"),
    "without width": (f"0 0.5 0.5 0 0.2\n{BOX}", [PIXELS], r"dropped: .*line 1 \('dog'\).*without width or"),
    "a point": ("0 0.5 0.5 0.5 0.5 0.5 0.5", [], r"dropped: .*without width or height"),
    "outside": ("0 1.005 0.5 0.001 0.2", [], r"dropped: .*outside of the 40 x 30 image"),
    "a tiny box": ("0 0.5 0.5 0.00001 0.2", [], r"dropped: .*a side is shorter than 0\.001 pixels"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected", "note"), LINES.values(), ids=list(LINES))
def test_lines(tmp_path: Path, text: object, expected: list[list[float]], note: str) -> None:
    coco, notes = one_image(tmp_path, text)
    assert boxes(coco) == expected
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(expected) + 1))
    assert [a["area"] for a in coco["annotations"]] == pytest.approx([w * h for _, _, w, h in expected])
    found = [line for line in notes if not line.startswith("1 polygons") or "polygons" in note]
    assert len(found) == bool(note), notes
    assert not note or re.search(note, found[0])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("0 0.5 0.5 0.5", "4 columns, expected 5 .* or the points of a polygon"),
        ("0", "1 columns"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "8 columns"),
        ("dog 0.5 0.5 0.5 0.2", "class 'dog', expected a whole number from 0 to 1"),
        ("2 0.5 0.5 0.5 0.2", "class '2', expected a whole number from 0 to 1 .2 names"),
        ("-1 0.5 0.5 0.5 0.2", "class '-1'"),
        ("0.5 0.5 0.5 0.5 0.2", "class '0.5'"),
        ("1_0 0.5 0.5 0.5 0.2", "class '1_0'"),
        ("9e999 0.5 0.5 0.5 0.2", "class '9e999'"),
        ("0 nan 0.5 0.5 0.2", "cx is 'nan', expected a number from 0 to 1"),
        ("0 0,5 0.5 0.5 0.2", "cx is '0,5', expected a number"),
        ("0 0.5 0.5 0.5 \u0661", "height is '\u0661', expected a number"),
        ("0 320 240 50 60", "cx is 320, expected a fraction of the image from 0 to 1; divide pixels"),
        ("0 0.5 -0.02 0.5 0.2", "cy is -0.02, expected a fraction"),
        ("0 0.5 0.5 -0.001 0.2", "width is -0.001, expected a fraction"),
        ("0 0.5 0.5 0.5 0.2 7", "confidence is 7, expected a fraction"),
        ("0 0.1 0.2 0.6 0.3 0.2 1.9", "column 7 is 1.9, expected a fraction"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, error: str) -> None:
    with pytest.raises(ValueError, match=rf"^\S+a\.txt, line 2: {error}"):
        one_image(tmp_path, f"{BOX}\n{line}\n")


def test_keypoints_are_not_polygons(tmp_path: Path) -> None:
    text = f"{BOX} 0.1 0.1 2 0.9 0.9 1\n0 0.25 0.5 0.5 0.2"
    coco, notes = one_image(tmp_path, text, data="kpt_shape: [2, 3]")
    assert boxes(coco) == [PIXELS, [0, 12, 20, 6]]
    assert notes == ["1 lines have keypoints, which are not used"]
    with pytest.raises(ValueError, match=r"7 columns, expected 5 .* or 11 \(with keypoints\)"):
        one_image(tmp_path, "0 0.1 0.2 0.6 0.3 0.2 0.9", data="kpt_shape: [2, 3]")


def test_many_problems_are_reported_together(tmp_path: Path) -> None:
    write(tmp_path, images__train__b__png=0, labels__train__b__txt="7 0.5 0.5 0.5 0.2")
    with pytest.raises(ValueError, match=r"13 problems, the first 10:\n") as caught:
        one_image(tmp_path, "0 0 0 2 2\n" * 12)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and "a.txt, line 1: width is 2" in lines[1] and "line 10" in lines[10]


def test_unreadable_files_name_the_file(tmp_path: Path) -> None:
    one_image(tmp_path, BOX)
    label, image = tmp_path / "labels/train/a.txt", tmp_path / "images/train/a.png"
    label.write_bytes(b"0 0.5 0.5 0.5 \xff")
    image.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"a\.png: not readable as an image: "):
        convert_yolo(tmp_path, "train")
    Image.new("RGB", (40, 30)).save(image)
    with pytest.raises(ValueError, match=r"a\.txt: not a text file in UTF-8: invalid start byte at byte 14"):
        convert_yolo(tmp_path, "train")
    label.unlink()
    label.mkdir()
    with pytest.raises(ValueError, match=r"a\.txt: not a file"):
        convert_yolo(tmp_path, "train")


@pytest.mark.parametrize(("orientation", "size"), [(1, (40, 30)), (3, (40, 30)), (6, (30, 40)), (8, (30, 40))])
def test_size_of_a_rotated_photo(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    """The size is that of the upright image, and training then reads the upright image."""
    one_image(tmp_path, BOX)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = tmp_path / "images/train/a.png"
    Image.new("RGB", (40, 30)).save(photo, exif=exif)
    coco = convert_yolo(tmp_path, "train").coco
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == size
    assert read_image(photo, size).shape == (size[1], size[0], 3)
    assert boxes(coco) == [[size[0] / 4, size[1] * 0.4, size[0] / 2, size[1] / 5]]
