"""VOC -> COCO, on folders written by the tests and, if it is available, on BCCD."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina.convert.voc import convert_voc

BCCD = Path(__file__).parents[3] / "shared/data/BCCD"


def voc_object(name: str, box: tuple[object, ...], extra: str = "") -> str:
    xmin, ymin, xmax, ymax = box
    bndbox = f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"
    return f"<object><name>{name}</name>{extra}{bndbox}</object>"


def write_image(root: Path, stem: str, objects: str, size: str = "<width>40</width><height>30</height>") -> None:
    """A 40 x 30 image with its annotation. The `filename` in the XML is wrong on purpose."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "Annotations" / f"{stem}.xml").write_text(
        f"<annotation><filename>elsewhere</filename><size>{size}<depth>3</depth></size>{objects}</annotation>"
    )
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{stem}.jpg")


def write_split(root: Path, split: str, *lines: str) -> None:
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(lines))


def one_image(root: Path, objects: str, **settings: str) -> tuple[dict, list[str]]:
    write_image(root, "a", objects, **settings)
    write_split(root, "train", "a")
    coco, notes, _ = convert_voc(root, "train")
    return coco, notes


def coco_stats(coco_gt: COCO, results: list[list[float]]) -> np.ndarray:
    """The twelve COCO numbers of rows (image id, x, y, width, height, score, category id)."""
    coco_eval = COCOeval(coco_gt, coco_gt.loadRes(np.array(results)), "bbox")
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval.stats


def test_boxes_ids_and_categories(tmp_path: Path) -> None:
    write_image(tmp_path, "a", voc_object("dog", (1, 2, 11, 22)) + voc_object(" cat ", ("3.5", 0, 40, 30)))
    write_image(tmp_path, "b", "")
    write_image(tmp_path, "c", voc_object("ant", (5, 6, 7, 8)))
    write_split(tmp_path, "train", "b", "a", "")
    write_split(tmp_path, "val", "c")
    coco, notes, _ = convert_voc(tmp_path, "train")

    assert coco["images"] == [
        {"id": 1, "file_name": "b.jpg", "width": 40, "height": 30},
        {"id": 2, "file_name": "a.jpg", "width": 40, "height": 30},
    ]
    # "ant" is in val only, but both splits have the same ids
    names = [{"id": 1, "name": "ant"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert coco["categories"] == names == convert_voc(tmp_path, "val").coco["categories"]
    assert [(a["id"], a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in coco["annotations"]] == [
        (1, 2, 3, [1, 2, 10, 20], 200),
        (2, 2, 2, [3.5, 0, 36.5, 30], 1095),
    ]
    assert notes == []


def test_given_categories_keep_their_order_and_exclude_others(tmp_path: Path) -> None:
    write_image(tmp_path, "a", "".join(voc_object(name, (1, 1, 9, 9)) for name in ("ant", "bee", "cat", "ant")))
    write_image(tmp_path, "b", voc_object("yak", (1, 1, 9, 9)))  # of another split
    write_split(tmp_path, "train", "a")
    coco, notes, _ = convert_voc(tmp_path, "train", ["cat", "bee", "yak"])
    assert [(c["id"], c["name"]) for c in coco["categories"]] == [(1, "cat"), (2, "bee"), (3, "yak")]
    assert [a["category_id"] for a in coco["annotations"]] == [2, 1]
    assert len(notes) == 1 and "2 objects of class 'ant'" in notes[0]
    for invalid in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match=r"distinct class names"):
            convert_voc(tmp_path, "train", invalid)


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        (["rbc", "WBC"], "Annotations: no object of class 'rbc' in any file; did you mean 'RBC'?"),
        (["Platelet"], "Annotations: no object of class 'Platelet' in any file; did you mean 'Platelets'?"),
        (["dog"], "Annotations: no object of class 'dog' in any file; known: Platelets, RBC, WBC"),
    ],
)
def test_categories_that_no_file_has_are_refused(tmp_path: Path, categories: list[str], expected: str) -> None:
    write_image(tmp_path, "a", voc_object("RBC", (1, 1, 9, 9)) + voc_object("WBC", (1, 1, 9, 9)))
    write_image(tmp_path, "b", voc_object("Platelets", (1, 1, 9, 9)))
    write_split(tmp_path, "train", "a")
    with pytest.raises(ValueError) as error:
        convert_voc(tmp_path, "train", categories)
    assert str(error.value) == f"{tmp_path}/{expected}"
    with pytest.raises(ValueError, match=r"2 problems:\n.*'x' in any file.*\n.*'y' in any file"):
        convert_voc(tmp_path, "train", ["x", "y"])
    # A class of the other data of a project keeps its id.
    coco, notes, _ = convert_voc(tmp_path, "train", ["dog", "RBC"])
    assert [category["name"] for category in coco["categories"]] == ["dog", "RBC"]
    assert "no object of class 'dog' in any file; known: Platelets, RBC, WBC" in notes


def test_boxes_without_area_or_outside_are_dropped_with_a_note(tmp_path: Path) -> None:
    boxes = [
        (5, 5, 5, 9),
        (5, 9, 8, 9),
        (9, 5, 3, 9),
        (40, 0, 50, 9),
        (-9, 3, 0, 5),
        (-4, 20, 50, 31),
        (0, 0, 40, 30),
    ]
    coco, notes = one_image(tmp_path, "".join(voc_object("dog", box) for box in boxes))
    assert [a["bbox"] for a in coco["annotations"]] == [[0, 20, 40, 10], [0, 0, 40, 30]]
    assert [a["id"] for a in coco["annotations"]] == [1, 2]
    assert [note.split(":")[0] for note in notes] == ["dropped"] * 5 + ["clipped"]
    assert "a.xml: object 1 of 7 ('dog'), box (5, 5, 5, 9)" in notes[0]
    assert all("xmax <= xmin or ymax <= ymin" in note for note in notes[:3])
    assert all("outside of the 40 x 30 image" in note for note in notes[3:5])


def test_difficult_objects_do_not_count_in_pycocotools(tmp_path: Path) -> None:
    plain = voc_object("dog", (2, 2, 12, 12), "<difficult>0</difficult>")
    difficult = voc_object("dog", (20, 10, 30, 28), "<difficult>1</difficult>")
    coco, _ = one_image(tmp_path, plain + difficult + voc_object("dog", (2, 15, 12, 29)))
    assert [a["iscrowd"] for a in coco["annotations"]] == [0, 1, 0]

    coco_gt = COCO()
    coco_gt.dataset = coco
    coco_gt.createIndex()
    # the difficult one scores highest: as a false positive it would halve the precision of all that follow
    scores = [0.5, 0.9, 0.6]
    results = [[1, *a["bbox"], score, 1] for a, score in zip(coco["annotations"], scores, strict=True)]
    assert coco_stats(coco_gt, results)[0] == pytest.approx(1.0)
    assert coco_stats(coco_gt, results[:1])[8] == pytest.approx(0.5), "recall of one in two objects, not in three"


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ("<width>0</width><height>0</height>", "0 x 0"),
        ("", r"(none) x (none)"),
        ("<width>41</width><height>30</height>", "41 x 30"),
        ("<width>30</width><height>40</height>", "rotated"),
    ],
)
def test_image_size_comes_from_the_file_when_the_xml_is_wrong(tmp_path: Path, size: str, note: str) -> None:
    coco, notes = one_image(tmp_path, voc_object("dog", (0, 0, 9, 9)), size=size)
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (40, 30)
    assert len(notes) == 1 and note in notes[0] and "a.xml" in notes[0] and "40 x 30" in notes[0]


def test_a_photo_with_an_exif_rotation_has_the_size_that_the_xml_names(tmp_path: Path) -> None:
    """Stored 40x30, shown 30x40, and the boxes were drawn on what is shown."""
    for size, expected in ((("30", "40"), (30, 40)), (("40", "30"), (40, 30))):
        exif = Image.Exif()
        exif[0x0112] = 6
        text = "<width>{}</width><height>{}</height>".format(*size)
        write_image(tmp_path, "a", voc_object("dog", (11, 21, 20, 40)), size=text)
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages/a.jpg", exif=exif)
        write_split(tmp_path, "train", "a")
        coco, notes, _ = convert_voc(tmp_path, "train")
        assert (coco["images"][0]["width"], coco["images"][0]["height"]) == expected
        assert (coco["annotations"][0]["bbox"], notes) == ([11, 21, 9, 19], []) or expected == (40, 30)


def test_split_lines(tmp_path: Path) -> None:
    """Two columns, stems with spaces and dots, repeated lines, a byte order mark."""
    for stem in ("a", "b", "two words", "v1.2"):
        write_image(tmp_path, stem, voc_object("dog", (0, 0, 9, 9)))
    write_split(tmp_path, "dog_train", "\ufeffa  1", "b -1", "two words", "v1.2 0", "a")
    coco, notes, _ = convert_voc(tmp_path, "dog_train")
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg", "b.jpg", "two words.jpg", "v1.2.jpg"]
    assert len(notes) == 1 and "line 5 ('a')" in notes[0]


def test_parts_of_persons_are_not_objects(tmp_path: Path) -> None:
    part = voc_object("head", (1, 1, 2, 2)).replace("object>", "part>")
    coco, notes = one_image(tmp_path, voc_object("person", (3, 4, 13, 14), part))
    assert notes == []
    assert [c["name"] for c in coco["categories"]] == ["person"]
    assert [a["bbox"] for a in coco["annotations"]] == [[3, 4, 10, 10]]


def test_missing_files_name_the_line(tmp_path: Path) -> None:
    one_image(tmp_path, voc_object("dog", (0, 0, 9, 9)))
    write_split(tmp_path, "train", "a", "ghost 1")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 2 \('ghost 1'\): no annotation; .*ghost\.xml"):
        convert_voc(tmp_path, "train")
    (tmp_path / "JPEGImages/a.jpg").rename(tmp_path / "JPEGImages/a.txt")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 1 \('a'\): no image; .*JPEGImages.a\.\*"):
        convert_voc(tmp_path, "train")
    for suffix in (".png", ".JPG"):
        Image.new("RGB", (40, 30)).save(tmp_path / f"JPEGImages/a{suffix}")
    with pytest.raises(ValueError, match=r"line 1 .*a\.JPG and a\.png"):
        convert_voc(tmp_path, "train")


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path) -> None:
    one_image(tmp_path, voc_object("dog", (0, 0, 9, 9)))
    write_split(tmp_path, "train", "a", "x" * 5000)
    with pytest.raises(
        FileNotFoundError, match=r"train\.txt, line 2 \('x+'\.\.\.\): no annotation; looked for"
    ) as caught:
        convert_voc(tmp_path, "train")
    assert len(str(caught.value)) < 1000


def test_problems_of_several_files_are_reported_together(tmp_path: Path) -> None:
    for stem in "abc":
        write_image(tmp_path, stem, voc_object("dog", (0, 0, 9, 9)))
    write_split(tmp_path, "train", "a", "b", "c", "d")
    (tmp_path / "JPEGImages/a.jpg").write_bytes(b"GIF89a")
    (tmp_path / "JPEGImages/b.jpg").unlink()
    (tmp_path / "JPEGImages/b.jpg").mkdir()
    with pytest.raises(ValueError, match=r"^\S+: 3 problems:\n") as caught:
        convert_voc(tmp_path, "train")
    _, *lines = str(caught.value).splitlines()
    assert "JPEGImages/a.jpg: not readable as an image: " in lines[0]
    assert lines[1].endswith("JPEGImages/b.jpg: not readable as an image: not a file")
    assert "line 4 ('d'): no annotation" in lines[2]


def test_folder_split_and_empty_split_are_checked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a VOC folder: expected Annotations"):
        convert_voc(tmp_path, "train")
    one_image(tmp_path, voc_object("dog", (0, 0, 9, 9)))
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.*available splits: train"):
        convert_voc(tmp_path, "test")
    write_split(tmp_path, "none", " ", "")
    with pytest.raises(ValueError, match=r"none\.txt is empty"):
        convert_voc(tmp_path, "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object></annotation>", "not well-formed"),
        ("", "not well-formed"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "klingon"),
        ("<html/>", "expected <annotation>"),
        ("<annotation><object/></annotation>", "object 1.*<name> is missing"),
        (
            "<annotation><object><name>x</name></object></annotation>",
            "object 1 of 1: <bndbox/xmin> is missing",
        ),
        (f"<annotation>{voc_object('x', ('left', 0, 1, 1))}</annotation>", "<xmin> is 'left'"),
        (f"<annotation>{voc_object('x', (0, 0, 1, 'nan'))}</annotation>", "<ymax> is 'nan'"),
    ],
)
def test_unreadable_annotations_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    one_image(tmp_path, voc_object("dog", (0, 0, 9, 9)))
    (tmp_path / "Annotations/a.xml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.xml: .*{message}"):
        convert_voc(tmp_path, "train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_doctype_is_refused_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    one_image(tmp_path, voc_object("dog", (0, 0, 9, 9)))
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<!DOCTYPE annotation [<!ENTITY e0 "ha">{entities}]><annotation>&e9;</annotation>'
    (tmp_path / "Annotations/a.xml").write_bytes(bomb.encode(encoding))
    with pytest.raises(ValueError, match=r"a\.xml: has a DOCTYPE"):
        convert_voc(tmp_path, "train")


def test_files_that_macos_adds_to_archives_are_skipped(tmp_path: Path) -> None:
    write_image(tmp_path, "a", voc_object("dog", (0, 0, 9, 9)))
    (tmp_path / "Annotations/._a.xml").write_bytes(b"\0\5\x16\7")
    (tmp_path / "JPEGImages/._a.jpg").write_bytes(b"\0\5\x16\7")
    write_split(tmp_path, "train", "a")
    assert len(convert_voc(tmp_path, "train").coco["annotations"]) == 1


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"the BCCD data set is not at {BCCD}")
def test_bccd() -> None:
    """The expected counts come from the text of the XML files; the boxes without area were looked up by hand."""
    categories = []
    for split, images, dropped in [
        ("train", 205, "BloodImage_00343.xml: object 4 of 12 ('RBC'), box (181, 329, 181, 329)"),
        ("val", 87, "BloodImage_00338.xml: object 13 of 14 ('RBC'), box (504, 337, 504, 337)"),
    ]:
        coco, notes, _ = convert_voc(BCCD, split)
        stems = (BCCD / f"ImageSets/Main/{split}.txt").read_text().split()
        raw = "".join((BCCD / f"Annotations/{stem}.xml").read_text() for stem in stems)
        assert len(coco["images"]) == images
        assert len(coco["annotations"]) == raw.count("<object>") - 1
        assert len(notes) == 1 and dropped in notes[0]
        for category in coco["categories"]:
            number = sum(a["category_id"] == category["id"] for a in coco["annotations"])
            assert number == raw.count(f"<name>{category['name']}</name>") - (category["name"] == "RBC")
        categories.append(coco["categories"])
    assert categories[0] == categories[1]
    assert [c["name"] for c in categories[0]] == ["Platelets", "RBC", "WBC"]
