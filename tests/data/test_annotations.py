from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retina.data.annotations import DataError, read_annotations
from retina.data.coco import CocoDataset

TREE: dict[str, Any] = {
    "info": {"year": 2026},
    "images": [
        {"id": 9, "file_name": "b/c.png", "width": 40, "height": 30},
        {"id": 5, "file_name": "a.png", "width": 20, "height": 10, "license": 3},
    ],
    "annotations": [
        {"id": 70, "image_id": 5, "category_id": 11, "bbox": [1, 2.5, 3, 4], "iscrowd": 1, "segmentation": [[1, 2]]},
        {"id": 71, "image_id": 9, "category_id": 4, "bbox": [0, 0, 5, 6], "iscrowd": False, "area": 7.5},
        {"image_id": 9, "category_id": 4, "bbox": [0, 0, 5, 7], "area": None},
    ],
    "categories": [{"id": 11, "name": "dog"}, {"id": 4, "name": "cat", "supercategory": "animal"}],
}
MISSING = object()


def write(root: Path, content: Any) -> Path:
    path = root / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def changed(*steps: str | int, to: Any) -> dict[str, Any]:
    """A copy of TREE with another value at one place."""
    tree: Any = copy.deepcopy(TREE)
    place = tree
    for step in steps[:-1]:
        place = place[step]
    if to is MISSING:
        del place[steps[-1]]
    else:
        place[steps[-1]] = to
    return tree  # type: ignore[no-any-return]


def test_a_file_becomes_columns(tmp_path: Path) -> None:
    file = read_annotations(write(tmp_path, TREE))
    assert file.image_ids.tolist() == [9, 5] and file.file_names.tolist() == ["b/c.png", "a.png"]
    assert file.widths.tolist() == [40, 20] and file.heights.tolist() == [30, 10]
    assert file.ids.tolist() == [70, 71, 3] and file.without_id == 1
    assert file.images.tolist() == [1, 0, 0] and file.labels.tolist() == [1, 0, 0]
    assert file.boxes.tolist() == [[1, 2.5, 3, 4], [0, 0, 5, 6], [0, 0, 5, 7]]
    assert file.areas.tolist() == [12, 7.5, 35] and file.crowd.tolist() == [True, False, False]
    assert file.category_ids == [4, 11] and file.names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("steps", "value", "message"),
    [
        (("images", 1, "width"), MISSING, r"images\[1\]: given .*; missing key `width`"),
        (("images", 1, "width"), 0, r"images\[1\].width: given 0; expected a whole number >= 1"),
        (("images", 1, "height"), 10.5, r"images\[1\].height: given 10.5; expected a whole number"),
        (("images", 1, "id"), "5", r"images\[1\].id: given \"5\"; expected a whole number"),
        (("images", 1, "id"), 9, r"images\[1\].id: given 9, which is already the id of images\[0\]"),
        (("images", 1, "id"), 2**70, r"images\[1\].id: given 1180591620717411303424; expected a whole number <= "),
        (("images", 1, "file_name"), None, r"images\[1\].file_name: given null; expected text in quotes"),
        (("images", 1, "file_name"), "", r"images\[1\].file_name: given \"\"; expected text in quotes of length >= 1"),
        (
            ("images", 1, "file_name"),
            "../a.png",
            r"images\[1\].file_name: given '../a.png', expected the path of a file",
        ),
        (("images", 1, "file_name"), "/a.png", r"file_name: given '/a.png', expected the path of a file"),
        (("images", 1, "file_name"), "a\0.png", r"file_name: given 'a\\x00.png', expected the path of a file"),
        (("annotations", 2, "image_id"), 6, r"annotations\[2\].image_id: given 6, which is not the id of an image"),
        (
            ("annotations", 2, "category_id"),
            1,
            r"category_id: given 1, which is not the id of a category; known: 4, 11",
        ),
        (("annotations", 2, "category_id"), None, r"annotations\[2\].category_id: given null; expected a whole number"),
        (("annotations", 2, "bbox"), [1, 2, 3], r"annotations\[2\].bbox: given \[1,2,3\]; expected a list .* length 4"),
        (("annotations", 2, "bbox"), [1, 2, 3, "4"], r"annotations\[2\].bbox\[3\]: given \"4\"; expected a number"),
        (("annotations", 2, "bbox"), [1, 2, 3, 10**400], r"annotations\[2\].bbox\[3\]: given 10*\.\.\.; number out of"),
        (("annotations", 2, "bbox"), [1, 2, 3, float("nan")], r"line 1, column \d+, at 'NaN.*; JSON has no NaN"),
        (("annotations", 2, "iscrowd"), "yes", r"annotations\[2\].iscrowd: given \"yes\"; expected 0 or 1"),
        (("annotations", 2, "iscrowd"), 2, r"annotations\[2\].iscrowd: given 2; expected a whole number <= 1"),
        (("annotations", 2, "area"), "x", r"annotations\[2\].area: given \"x\"; expected a number"),
        (("annotations", 2), 3, r"annotations\[2\]: given 3; expected an object"),
        (("annotations",), None, r"annotations: given null; expected a list"),
        (("annotations",), MISSING, r"top level: given .*; missing key `annotations`"),
        (("categories", 0, "id"), 4, r"categories\[1\].id: given 4, which is already the id of categories\[0\]"),
        (("categories", 0, "name"), 3, r"categories\[0\].name: given 3; expected text in quotes"),
        (("categories",), [], r"categories: the list is empty, expected at least one category"),
    ],
)
def test_errors_name_place_and_value(tmp_path: Path, steps: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.json: (?s:.*){message}"):
        read_annotations(write(tmp_path, changed(*steps, to=value)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" ", "not JSON: the file is empty"),
        (b'{"images": [', "not JSON: Input data was truncated"),
        (b'{"images": [],\n "a" 3}', r"not JSON: .* in line 2, column 6, at '3}'"),
        (json.dumps(TREE).encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
        (json.dumps(TREE).replace("a.png", "\xe9").encode("latin-1"), "not JSON: 'utf-8' codec can't decode"),
        (json.dumps(TREE).replace("a.png", "\\ud800").encode(), "not JSON: unexpected end of"),
        (b"[" * 100_000, r"not JSON|nested too deeply"),
        (b'{"info": ' + b"[" * 100_000, "nested too deeply"),
        (b"[]", r"top level: given \[\]; expected an object"),
    ],
)
def test_files_that_are_not_coco_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
        read_annotations(write(tmp_path, content))


def test_whole_numbers_may_have_a_decimal_point(tmp_path: Path) -> None:
    tree = changed("annotations", 1, "image_id", to=9.0)
    tree["annotations"][1] |= {"category_id": 4.0, "id": 71.0, "iscrowd": 0.0}
    tree["images"][0] |= {"width": 40.0, "id": 9.0}
    tree["annotations"][0]["iscrowd"] = None
    file, expected = read_annotations(write(tmp_path, tree)), changed("annotations", 0, "iscrowd", to=0)
    assert all(np.array_equal(a, b) for a, b in zip(file, read_annotations(write(tmp_path, expected)), strict=True))


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert len(read_annotations(write(tmp_path, json.dumps(TREE).encode("utf-8-sig"))).ids) == 3


def test_several_errors_are_reported_together(tmp_path: Path) -> None:
    entries = [{"image_id": 5, "category_id": 4, "bbox": [0, 0, 1, "x"]}] * 12
    with pytest.raises(DataError, match=r"12 errors, the first 10:(?s:\n  annotations\[\d\].bbox\[3\][^\n]*){10}$"):
        read_annotations(write(tmp_path, changed("annotations", to=entries)))
    entries = [{"image_id": 6, "category_id": 4, "bbox": [0, 0, 1, 1]}] * 2
    with pytest.raises(DataError, match=r"2 errors:\n  annotations\[0\].image_id: [^\n]*\n  annotations\[1\].image_id"):
        read_annotations(write(tmp_path, changed("annotations", to=entries)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("images", "expected the images of the annotations"), ("categories", "expected at least one category")],
)
def test_an_empty_list_is_named_once(tmp_path: Path, name: str, reason: str) -> None:
    """Not once more for each annotation that refers to it."""
    with pytest.raises(DataError) as error:
        read_annotations(write(tmp_path, changed(name, to=[])))
    assert str(error.value) == f"{tmp_path}/a.json: {name}: the list is empty, {reason}"


def test_a_file_without_images_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, {**TREE, "images": [], "annotations": []})
    with pytest.raises(DataError, match=r"a.json: no images to use: its `images` is empty$"):
        CocoDataset(file, tmp_path)
    file = write(tmp_path, {**TREE, "annotations": []})
    with pytest.raises(DataError, match=r"no images to use: none has objects \(data.empty_images=drop\)$"):
        CocoDataset(file, tmp_path, empty_images="drop")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json: no such annotation file"):
        read_annotations(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_annotations(tmp_path)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place of a JSON tree, as the steps that lead to it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, child in inside for place in places(child, (*path, key))]


VALUES = st.one_of(
    st.sampled_from(
        [MISSING, None, True, 0, -1, 1, 5, 9, 2**31, 2**63, -(2**64), 10**400, 1e308, -1e308, 0.5, "", "x"]
    ),
    st.sampled_from([float("nan"), float("inf"), [], {}, [[]], [1, 2, 3, 4], {"id": 5}, "../x", "a\0", "\ud800", "1"]),
    st.floats(),
    st.text(max_size=3),
)


FUZZ = settings(
    max_examples=700,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_or_refuse(path: Path) -> None:
    """Opening the file gives valid records or a DataError that names the file; the file stays as it is."""
    content = path.read_bytes()
    try:
        dataset = CocoDataset(path, path.parent)
        for record in dataset.records:
            boxes = np.concatenate([record.boxes, record.ignore])
            assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
            assert (boxes[:, 2:] <= [record.width, record.height]).all()
            assert ((record.labels >= 0) & (record.labels < dataset.num_classes)).all()
            assert len(record.labels) == len(record.boxes)
    except DataError as error:
        assert str(path) in str(error) and "\0" not in str(error)
    assert path.read_bytes() == content


@FUZZ
@given(changes=st.lists(st.tuples(st.sampled_from(places(TREE)), VALUES), min_size=1, max_size=3))
def test_no_changed_value_ends_in_another_exception(tmp_path: Path, changes: list[tuple[Any, Any]]) -> None:
    tree: Any = TREE
    for steps, value in changes:
        before, tree = tree, copy.deepcopy(tree)
        place = tree
        try:
            for step in steps[:-1]:
                place = place[step]
            if value is MISSING:
                del place[steps[-1]]
            else:
                place[steps[-1]] = value
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            tree = before
    read_or_refuse(write(tmp_path, json.dumps(tree).encode(errors="surrogatepass")))


@FUZZ
@given(start=st.integers(0, 600), removed=st.integers(0, 40), inserted=st.binary(max_size=6))
@example(start=0, removed=0, inserted=b"\xff\xfe")
def test_no_changed_bytes_end_in_another_exception(tmp_path: Path, start: int, removed: int, inserted: bytes) -> None:
    content = json.dumps(TREE).encode()
    read_or_refuse(write(tmp_path, content[:start] + inserted + content[start + removed :]))
