"""YOLO -> COCO: where images, labels and class names are found, on folders written by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from yolo_helpers import BOX, PIXELS, boxes, one_image, write

from retina.convert.yolo import convert_yolo

LAYOUTS = {
    "images/split": ("images/train/a.png", "labels/train/a.txt"),
    "split/images": ("train/images/a.png", "train/labels/a.txt"),
    "side by side": ("train/a.png", "train/a.txt"),
    "labels beside the images of a folder images": ("images/train/a.png", "images/train/a.txt"),
    "nested": ("images/train/x/y/a.png", "labels/train/x/y/a.txt"),
    "two folders images": ("images/train/images/a.png", "images/train/labels/a.txt"),
}


@pytest.mark.parametrize(("image", "label"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_layouts_without_data_yaml(tmp_path: Path, image: str, label: str) -> None:
    for path in (image, label):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(tmp_path / image)
    (tmp_path / label).write_text(BOX)
    coco, notes, images = convert_yolo(tmp_path, "train", ["dog"])
    assert boxes(coco) == [PIXELS] and notes == []
    assert images / coco["images"][0]["file_name"] == tmp_path / image
    with pytest.raises(FileNotFoundError, match=r"no class names: .*classes\.txt.*--categories NAME"):
        convert_yolo(tmp_path, "train")


def test_a_folder_without_splits(tmp_path: Path) -> None:
    write(tmp_path, images__a__png=0, labels__a__txt=BOX, labels__classes__txt="dog\n\ncat\n")
    coco, notes, images = convert_yolo(tmp_path)
    assert boxes(coco) == [PIXELS] and notes == [] and images == tmp_path / "images"
    assert coco["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    flat = write(tmp_path / "flat", a__png=0, a__txt=BOX, obj__names="dog")
    assert convert_yolo(flat).coco["images"][0]["file_name"] == "a.png"
    write(tmp_path / "split", images__train__a__png=0, valid__images__a__png=0)
    with pytest.raises(FileNotFoundError, match=r"give one of its splits with --split; found: train, valid"):
        convert_yolo(tmp_path / "split")
    with pytest.raises(FileNotFoundError, match=r"no split 'val'.*found: train, valid"):
        convert_yolo(tmp_path / "split", "val")
    write(tmp_path / "split", train__images__a__png=0)
    with pytest.raises(ValueError, match=r"images of split 'train' are in .* and .*; remove one"):
        convert_yolo(tmp_path / "split", "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder or file"):
        convert_yolo(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train",
        "train: ../images/train",  # Roboflow
        "path: ../datasets/not_here\ntrain: images/train",
        "path: images\ntrain: train",
        "path: .\ntrain: [images/train]",
        "path:\ntrain: images\\train\nval:",
        "train: train.txt",
        "train: lists/train.txt",
        "train: cvat.txt",
    ],
)
@pytest.mark.parametrize("names", ["[no, cat]", "{1: cat, 0: no}", "\n- no\n- cat\nnc: 2"])
def test_data_yaml(tmp_path: Path, text: str, names: str) -> None:
    """`no` is a name, not the boolean that YAML makes of it. The file may also have another name than data.yaml."""
    root = write(
        tmp_path / "set",
        images__train__a__png=0,
        labels__train__a__txt=BOX.replace("0 ", "1.0 ", 1),
        train__txt="./images/train/a.png\n\n",
        lists__train__txt="\ufeffimages\\train\\a.png\r\n",
        cvat__txt="data/images/train/a.png",
        data__yaml=f"{text}\nnames: {names}",
    )
    coco, notes, images = convert_yolo(root, "train")
    assert boxes(coco) == [PIXELS] and notes == []
    assert coco["annotations"][0]["category_id"] == 2
    assert coco["categories"] == [{"id": 1, "name": "no"}, {"id": 2, "name": "cat"}]
    assert images.samefile(root / "images/train") and coco["images"][0]["file_name"] == "a.png"
    (root / "data.yaml").rename(root / "other.yaml")
    assert convert_yolo(root / "other.yaml", "train").coco["annotations"] == coco["annotations"]


def test_a_split_of_several_folders_and_lists(tmp_path: Path) -> None:
    """The file names are relative to the folder that all images share; an image of two folders is used once."""
    root = write(
        tmp_path, a__images__one__png=0, a__labels__one__txt=BOX, b__images__one__png=0, b__labels__one__txt=""
    )
    write(root, list__txt="a/images/one.png", data__yaml="train: [a/images, b/images, list.txt]\nnames: [dog]")
    coco, notes, images = convert_yolo(root, "train")
    assert images == root
    assert [image["file_name"] for image in coco["images"]] == ["a/images/one.png", "b/images/one.png"]
    assert [image["id"] for image in coco["images"]] == [1, 2] and coco["annotations"][0]["image_id"] == 1
    assert len(notes) == 1 and notes[0].startswith("repeated: ") and "one.png" in notes[0]


def test_roboflow_path_with_two_meanings_is_noted(tmp_path: Path) -> None:
    root = write(tmp_path / "set", images__train__b__png=0, data__yaml="train: ../images/train\nnames: [dog]")
    write(tmp_path, images__train__a__png=0, labels__train__a__txt=BOX)
    coco, notes, _ = convert_yolo(root, "train")
    assert coco["images"][0]["file_name"] == "a.png" and notes[0].startswith("ambiguous: ")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "expected the keys train, val and names, given nothing"),
        ("- a", "expected the keys train, val and names, given a list"),
        ("train: [", "not readable as YAML"),
        ("train: \0", "not readable as YAML"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("names: [dog]", "expected one of the keys train, val, test"),
        ("val: images/train", "no split 'train'; available splits: val"),
        ("train: nowhere", "train: 'nowhere' does not exist; looked for "),
        ("train: {a: b}", "train: entry 1: expected text, given a dict"),
        ("train: images/train\nnames: dog", "names: expected a list of class names"),
        ("train: images/train\nnames: {0: dog, 2: cat}", "names: expected the class numbers 0 to 1, .* given 0, 2"),
        ("train: images/train\nnames: {dog: 0}", "names: expected a whole number from 0, given 'dog'"),
        ("train: images/train\nnames: [dog, [cat]]", "names: entry 2: expected text, given a list"),
        ("train: images/train\nnames: [dog, dog]", "distinct class names, got more than one of .'dog'"),
        ("train: images/train\nnames: [dog]\nnc: 2", "nc is 2, but .* has 1 class names"),
        ("train: images/train\nnames: [dog]\nnc: two", "nc: expected a whole number from 0, given 'two'"),
        ("train: images/train\nnames: [dog]\nkpt_shape: [3]", "kpt_shape: expected .number of keypoints, 2 or 3."),
        ("train: images/train\nnc: 1", "no class names"),
        ("train: list.txt\nnames: [dog]", "list.txt, line 2: no image; looked for .*gone.png"),
        ("train: empty\nnames: [dog]", "no images in .*empty"),
    ],
)  # fmt: skip
def test_data_yaml_that_is_not_right(tmp_path: Path, text: str, error: str) -> None:
    write(tmp_path, images__train__a__png=0, labels__train__a__txt=BOX, data__yaml=text)
    write(tmp_path, list__txt="images/train/a.png\ngone.png", empty__x__txt="")
    with pytest.raises((ValueError, FileNotFoundError), match=error) as caught:
        convert_yolo(tmp_path, "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_aliases_that_would_fill_the_memory(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 12))
    write(tmp_path, images__train__a__png=0, data__yaml=f"{bomb}train: *a11\nnames: *a11")
    with pytest.raises(ValueError, match=r"train: entry 1: expected text, given a list"):
        convert_yolo(tmp_path, "train")


def test_categories_name_the_classes_if_no_file_does(tmp_path: Path) -> None:
    one_image(tmp_path, BOX)
    assert convert_yolo(tmp_path, "train", ["dog", "cat"]).coco["categories"][0]["name"] == "dog"
    with pytest.raises(ValueError, match=r"has the class names dog, cat; leave out --categories"):
        convert_yolo(tmp_path, "train", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"give one of its splits with --split: train"):
        convert_yolo(tmp_path)


def test_images_without_labels_and_labels_without_images(tmp_path: Path) -> None:
    write(tmp_path, images__train__b__png=0, images__train__notes__doc="", labels__train__c__txt=BOX)
    write(tmp_path, labels__train__classes__txt="dog", images__train___a__png=0)
    (tmp_path / "images/train/._a.png").write_bytes(b"\0\5\x16\7")  # macOS adds these to archives
    coco, notes = one_image(tmp_path, BOX)
    assert [image["file_name"] for image in coco["images"]] == ["_a.png", "a.png", "b.png"]
    assert [annotation["image_id"] for annotation in coco["annotations"]] == [2]
    assert len(notes) == 3
    assert "1 files in" in notes[0] and notes[0].endswith("not images that PIL reads: notes.doc")
    assert notes[1] == f"unused: 1 label files without an image: {tmp_path / 'labels/train/c.txt'}"
    assert notes[2] == "2 images have no label file: used as images without objects"
    (tmp_path / "labels/train/a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the 3 images has a label file; looked for .*labels/train/_a"):
        convert_yolo(tmp_path, "train")


def test_links_are_followed_once_and_hidden_folders_are_not_read(tmp_path: Path) -> None:
    root, store = tmp_path / "yolo", tmp_path / "store"
    write(root, images__train__a__png=0, labels__train__a__txt=BOX)
    write(store, images__b__png=0, labels__b__txt=BOX)
    write(root, images__train__hidden__c__png=0)
    (root / "images/train/hidden").rename(root / "images/train/.ipynb_checkpoints")
    for kind in ("images", "labels"):
        (root / kind / "train/linked").symlink_to(store / kind)
    (store / "images/loop").symlink_to(root / "images/train")
    coco, notes, _ = convert_yolo(root, "train", ["dog"])
    assert [image["file_name"] for image in coco["images"]] == ["a.png", "linked/b.png"]
    assert boxes(coco) == [PIXELS, PIXELS] and notes == []


def test_two_images_with_one_label_file(tmp_path: Path) -> None:
    write(tmp_path, images__train__a__bmp=0)
    with pytest.raises(ValueError, match=r"a\.png: has the same label file as a\.bmp: .*a\.txt; keep one image"):
        one_image(tmp_path, BOX)


def test_the_only_yaml_file_of_a_folder_is_its_data_file(tmp_path: Path) -> None:
    write(tmp_path, images__train__a__png=0, labels__train__a__txt=BOX)
    write(tmp_path, coco128__yaml="train: images/train\nnames: [dog, cat]\n")
    assert boxes(convert_yolo(tmp_path, "train").coco) == [PIXELS]
    write(tmp_path, other__yaml="train: images/train\nnames: [cow]\n")
    with pytest.raises(FileNotFoundError, match="no class names"):
        convert_yolo(tmp_path, "train")
