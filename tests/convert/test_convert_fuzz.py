"""Damaged VOC and YOLO folders: tools/convert.py writes a valid file or ends with a message, and changes no input.

Each case goes through main() of the command. A traceback is an exception of main(), so it fails the test.
"""

from __future__ import annotations

import encodings.aliases
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_helpers import run_main
from fuzz_helpers import FOLDER, LOOP, PIPE, Files, images_of_all_formats, mutate_bytes, mutate_image, mutate_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retina.data.coco import CocoDataset

MEMORY = Path("/dev/shm")
PICTURES = images_of_all_formats()
OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax>"
    "<ymax>13.5</ymax></bndbox></object>"
)
XML = (
    '<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.jpg</filename><size><width>24</width>'
    f"<height>16</height></size>{OBJECT.format('dog', 0)}{OBJECT.format('cat', 1)}</annotation>"
)
LABELS = "0 0.5 0.5 0.25 0.5\r\n1 0.1 0.2 0.6 0.3 0.2 0.9\n\n1 0.5 0.5 0.2 0.2 0.9\n"
LAYOUTS = [("images/train", "labels/train"), ("train/images", "train/labels"), ("train", "train")]
many_examples = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def voc_files(rng: random.Random) -> Files:
    picture = rng.choice(list(PICTURES))
    return {
        "Annotations/a.xml": XML.encode(),
        "Annotations/b.xml": b"<annotation></annotation>",
        "JPEGImages/a.jpg": PICTURES["jpg"],
        f"JPEGImages/b.{picture}": PICTURES[picture],
        "ImageSets/Main/train.txt": b"a 1\nb\n",
    }


def yolo_files(rng: random.Random) -> Files:
    images, labels = rng.choice(LAYOUTS)
    picture = rng.choice(list(PICTURES))
    files: Files = {
        f"{images}/a.jpg": PICTURES["jpg"],
        f"{images}/b.{picture}": PICTURES[picture],
        f"{labels}/a.txt": LABELS.encode(),
        f"{labels}/b.txt": b"0 0.5 0.5 1 1\n",
    }
    if rng.random() < 0.3:
        return files | {"classes.txt": b"dog\ncat\n"}
    source = rng.choice([f"../{images}", images, f"[{images}]", "list.txt", f"[list.txt, {images}]"])
    names = rng.choice(["[dog, cat]", "{0: dog, 1: cat}", "\n- dog\n- cat"])
    files["list.txt"] = f"{images}/a.jpg\n./{images}/b.{picture}\n".encode()
    return files | {"data.yaml": f"path: .\ntrain: {source}\nval:\nnc: 2\nnames: {names}\n".encode()}


def damage(files: Files, rng: random.Random) -> None:
    """One or two changes of a file: its bytes, its text, its picture, its kind, its name."""
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(list(files))
        content = files[name]
        action = rng.random()
        if action < 0.06:
            files[name] = rng.choice([FOLDER, PIPE, LOOP])
        elif action < 0.1:
            del files[name]
        elif action < 0.14:
            files[rng.choice([f"{name}.txt", f"{name[:-4]}.png", f"{name[:-4]}.xml", "data.yaml"])] = content
        elif isinstance(content, bytes) and name.rpartition(".")[2] in PICTURES:
            files[name] = mutate_image(content, rng)
        elif isinstance(content, bytes) and action < 0.35:
            files[name] = mutate_bytes(content, rng)
        elif isinstance(content, bytes):
            files[name] = mutate_text(content, name.rpartition(".")[2], rng)
        if not files:
            return


def contents(root: Path) -> dict[str, bytes | str | None]:
    """Every path below a folder with what it is."""
    paths = {str(path): path for path in root.rglob("*")}
    return {
        name: str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for name, path in paths.items()
    }


def convert(root: Path, files: Files, kind: str) -> int:
    """Write the files below `root`, run the command, check what it did, delete the folder. Returns the exit status."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == FOLDER:
            path.mkdir()
        elif content == PIPE:
            os.mkfifo(path)
        else:
            path.symlink_to(path.name)
    before = contents(root)
    output = root.with_name("coco.json")
    output.unlink(missing_ok=True)
    done = run_main("convert.py", kind, root, "--split", "train", "--output", output)
    assert contents(root) == before, "an input was changed"
    if done.returncode == 0:
        check_coco(output, Path(re.search(r"data\.train_images=(\S+)", done.stdout)[1]))  # type: ignore[index]
    else:
        assert done.returncode == 2 and not output.exists()
        assert done.stderr.startswith(f"convert {kind}: "), done.stderr[:2000]
        assert str(root) in done.stderr and "Traceback" not in done.stderr, done.stderr[:2000]
        assert len(done.stderr) < 10_000, done.stderr[:2000]
    assert [path for path in root.parent.iterdir() if path.name not in (root.name, output.name)] == []
    return done.returncode


def check_coco(output: Path, images: Path) -> None:
    coco = json.loads(output.read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    assert len(sizes) == len(coco["images"]) > 0 and len(categories) == len(coco["categories"]) > 0
    assert len({image["file_name"] for image in coco["images"]}) == len(sizes)
    assert all((images / image["file_name"]).is_file() for image in coco["images"])
    assert len({annotation["id"] for annotation in coco["annotations"]}) == len(coco["annotations"])
    for annotation in coco["annotations"]:
        (x, y, w, h), (width, height) = annotation["bbox"], sizes[annotation["image_id"]]
        assert annotation["category_id"] in categories
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and annotation["area"] == w * h > 0
        assert x + w <= width + 1e-9 and y + h <= height + 1e-9
    data_set = CocoDataset(output, images)  # training reads the same boxes
    assert data_set.notes == []
    assert sum(len(record.boxes) + len(record.ignore) for record in data_set.records) == len(coco["annotations"])


@pytest.fixture
def root() -> Iterator[Path]:
    """In memory where the system has such a folder: most of the time would go into deleting folders on a disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder) / "data"


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_undamaged_folders_convert(root: Path, kind: str) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        assert convert(root, voc_files(rng) if kind == "voc" else yolo_files(rng), kind) == 0, seed


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_damaged_folders(root: Path, kind: str) -> None:
    statuses = []
    for seed in range(1000):
        rng = random.Random(f"{kind} {seed}")
        files = voc_files(rng) if kind == "voc" else yolo_files(rng)
        damage(files, rng)
        try:
            statuses.append(convert(root, files, kind))
        except BaseException as error:
            error.add_note(f"seed {seed}: {files}"[:4000])
            raise
    assert 200 < sum(status == 0 for status in statuses) < 800, "many cases are refused, and many are converted"


words = st.one_of(
    st.floats(-0.1, 1.1).map(str), st.integers(-2, 3).map(str), st.floats().map(str), st.text(max_size=5),
    st.sampled_from(["nan", "inf", "1e999", "-0", "0x1", "1_0", "9" * 400, "\0", "\u0661", "0.0"]),
)  # fmt: skip
lines = st.lists(st.lists(words, max_size=9).map(" ".join), max_size=5).map("\n".join)


@many_examples
@given(content=st.one_of(st.binary(max_size=60), lines.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_label_file(root: Path, content: bytes) -> None:
    files = yolo_files(random.Random(3))
    convert(root, files | {next(name for name in files if name.endswith("a.txt")): content}, "yolo")


yaml_values = st.recursive(
    st.one_of(words, st.sampled_from(["train", "train/images", "[]", "{}", "~", "&a", "*a", "!!python/name:os.abort"])),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
    max_leaves=5,
)  # fmt: skip
yaml_keys = st.sampled_from(["path", "train", "names", "nc", "kpt_shape", "<<", "? [a]", "x"])
yaml_text = st.lists(st.tuples(yaml_keys, yaml_values).map(": ".join), max_size=5).map("\n".join)


@many_examples
@given(content=st.one_of(st.binary(max_size=60), yaml_text.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_data_yaml(root: Path, content: bytes) -> None:
    files: Files = {"train/images/a.jpg": PICTURES["jpg"], "train/labels/a.txt": b"0 0.5 0.5 0.5 0.5"}
    convert(root, files | {"data.yaml": content}, "yolo")


def element(tag: str, inner: list[str]) -> str:
    return f"<{tag}>{''.join(inner)}</{tag}>"


xml_tags = st.sampled_from(["annotation", "object", "bndbox", "name", "xmin", "ymin", "xmax", "ymax", "size", "width"])
xml_text = st.recursive(
    words.map(lambda text: re.sub("[<&>\0-\x1f]", "", text)),
    lambda inner: st.builds(element, xml_tags, st.lists(inner, max_size=6)),
    max_leaves=12,
)


@many_examples
@given(content=st.one_of(st.binary(max_size=60), xml_text.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_annotation_file(root: Path, content: bytes) -> None:
    files = voc_files(random.Random(3))
    convert(root, files | {"Annotations/a.xml": content}, "voc")
    convert(root, files | {"Annotations/a.xml": b"<annotation>" + content + XML.encode()[50:]}, "voc")


@pytest.mark.parametrize("encoding", sorted({*encodings.aliases.aliases.values(), "undefined"}))
def test_any_encoding_that_python_knows(root: Path, encoding: str) -> None:
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + XML.partition("?>")[2]
    convert(root, voc_files(random.Random(3)) | {"Annotations/a.xml": text.encode()}, "voc")


def test_deep_nesting(root: Path) -> None:
    depth = 200_000
    deep = b"<annotation>" + b"<object>" * depth + b"</object>" * depth + b"</annotation>"
    assert convert(root, voc_files(random.Random(3)) | {"Annotations/a.xml": deep}, "voc") == 2
    for deep in (b"train: " + b"[" * depth, b"- " * depth, b"? " * depth, b'train: "' + b"a" * depth):
        assert convert(root, yolo_files(random.Random(3)) | {"data.yaml": deep}, "yolo") == 2
