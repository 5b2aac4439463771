"""Damaged annotations and images: the check ends with findings, `read_image` with DataError, and no file changes."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_helpers import check, content, random_pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from retina.check import format_check
from retina.check.findings import Split
from retina.check.image_checks import check_files, read_facts
from retina.config import Config
from retina.config_file import load_config
from retina.data.annotations import DataError, read_annotations
from retina.data.coco import read_image

FUZZ = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIZE = (40, 30)
TREE: dict[str, Any] = {
    "images": [
        {"id": 9, "file_name": "0.png", "width": 40, "height": 30},
        {"id": 5, "file_name": "1.png", "width": 40, "height": 30},
    ],
    "annotations": [
        {"id": 70, "image_id": 5, "category_id": 11, "bbox": [1, 2.5, 13, 14], "iscrowd": 1},
        {"id": 71, "image_id": 9, "category_id": 4, "bbox": [0, 0, 15, 16], "iscrowd": 0, "area": 7.5},
        {"id": 72, "image_id": 9, "category_id": 4, "bbox": [20, 10, 15, 17]},
    ],
    "categories": [{"id": 11, "name": "dog"}, {"id": 4, "name": "cat"}],
}
REMOVED = object()
VALUES = st.one_of(
    st.sampled_from(
        [REMOVED, None, True, 0, -1, 1, 2, 5, 9, 100, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 1e-320, 1e308]
    ),
    st.sampled_from([-1e308, 1e-320, 0.5, 1e-3, float("nan"), "", "x", "./0.png", "a/b", "\ud800", "..", 300 * "x"]),
    st.sampled_from([[], {}, [[]], [1, 2, 3, 4], [1e308] * 4, [-5, -5, 100, 100], [0, 0, 1e-30, 5], [0, 0, 1, 1]]),
    st.floats(),
    st.text(max_size=3),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two splits with two images each."""
    root = tmp_path_factory.mktemp("fuzz")
    for seed, split in enumerate(("train", "val")):
        (root / split).mkdir()
        for image in range(2):
            random_pixels(np.random.default_rng([seed, image]), *SIZE).save(root / split / f"{image}.png")
        (root / f"{split}.json").write_text(json.dumps(TREE))
    paths = [f"data.{s}_annotations={root}/{s}.json" for s in ("train", "val")]
    base = Path(__file__).parents[2] / "configs/bccd.yaml"
    return load_config(base, [*paths, *(f"data.{s}_images={root}/{s}" for s in ("train", "val")), "data.max_side=64"])


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place of a JSON tree, as the steps that lead to it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, child in inside for place in places(child, (*path, key))]


def run_check(config: Config, split: str, changed: bytes) -> None:
    """The check of data with other contents of a file; everything stays as it is."""
    file = Path(getattr(config.data, f"{split}_annotations"))
    original = file.read_bytes()
    try:
        file.write_bytes(changed)
        before = content(file.parent)
        format_check(check(config))
        assert content(file.parent) == before
    finally:
        file.write_bytes(original)


@FUZZ
@given(
    split=st.sampled_from(["train", "val"]),
    changes=st.lists(st.tuples(st.sampled_from(places(TREE)), VALUES), min_size=1, max_size=3),
)
def test_no_changed_value_ends_in_an_exception(config: Config, split: str, changes: list[tuple[Any, Any]]) -> None:
    tree = copy.deepcopy(TREE)
    for steps, value in changes:
        place: Any = tree
        try:
            for step in steps[:-1]:
                place = place[step]
            if value is REMOVED:
                del place[steps[-1]]
            else:
                place[steps[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    run_check(config, split, json.dumps(tree).encode(errors="surrogatepass"))


@FUZZ
@given(start=st.integers(0, 600), removed=st.integers(0, 40), inserted=st.binary(max_size=6))
def test_no_changed_bytes_end_in_an_exception(config: Config, start: int, removed: int, inserted: bytes) -> None:
    changed = json.dumps(TREE).encode()
    run_check(config, "train", changed[:start] + inserted + changed[start + removed :])


def image_files() -> dict[str, bytes]:
    """One file of each kind, by its name."""
    pixels = random_pixels(np.random.default_rng(7), *SIZE)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 3, "a description"
    palette = pixels.quantize(64)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "a.jpg": (pixels, {"exif": exif}),
        "progressive.jpg": (pixels, {"progressive": True}),
        "cmyk.jpg": (pixels.convert("CMYK"), {}),
        "a.png": (pixels, {"exif": exif}),
        "palette.png": (palette, {"transparency": 3}),
        "gray16.png": (Image.fromarray(np.asarray(pixels.convert("L")).astype(np.uint16) * 256), {}),
        "a.gif": (palette, {"save_all": True, "append_images": [pixels.rotate(90)]}),
        "a.tiff": (pixels, {"exif": exif}),
        "packed.tiff": (pixels, {"compression": "tiff_lzw"}),
        "float.tiff": (Image.fromarray(np.asarray(pixels.convert("L"), np.float32)), {}),
        "a.bmp": (pixels, {}),
        "a.webp": (pixels, {"exif": exif}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "jpeg"}.get(name.split(".")[1], name.split(".")[1]), **options)
        files[name] = buffer.getvalue()
    return files


def damaged(rng: random.Random, original: bytes) -> bytes:
    data = bytearray(original)
    kind = rng.choice(["flip", "flip", "header", "header", "cut", "insert", "zero", "junk"])
    if kind in ("flip", "header"):
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(min(len(data), 120) if kind == "header" else len(data))
            data[place] = rng.choice([rng.randrange(256), 0, 255, data[place] ^ (1 << rng.randrange(8))])
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "insert":
        place = rng.randrange(len(data))
        data[place:place] = rng.randbytes(rng.randint(1, 9))
    elif kind == "zero":
        place = rng.randrange(len(data))
        data[place : place + 50] = bytes(len(data[place : place + 50]))
    else:
        data[: rng.randint(2, 30)] = rng.randbytes(rng.randint(2, 30))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # PIL's, about damaged tags
@pytest.mark.parametrize("name", image_files())
def test_damaged_images_are_reported_as_the_training_would_refuse_them(tmp_path: Path, name: str) -> None:
    rng = random.Random(f"images {name}")
    original = image_files()[name]
    (tmp_path / "images").mkdir()
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    refused = []
    for number in range(60):
        path = tmp_path / "images" / f"{number}-{name}"
        path.write_bytes(damaged(rng, original) if number else original)
        tree["images"].append({"id": number, "file_name": path.name, "width": SIZE[0], "height": SIZE[1]})
        try:
            pixels = read_image(path, SIZE)
            assert pixels.shape == (SIZE[1], SIZE[0], 3) and pixels.dtype == np.uint8
            refused.append(False)
        except DataError as error:
            assert str(path) in str(error)
            refused.append(True)
        read_facts(path, SIZE, False)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(tree))
    before = content(tmp_path)
    split = Split("train", read_annotations(file), tmp_path / "images")
    found = []
    for number in range(60):
        facts = read_facts(split.image_path(number), SIZE, True)
        errors = [f for f in check_files(split, np.array([number]), [facts]) if f.texts.severity == "error"]
        found.append(bool(errors))
    assert found == refused
    assert not refused[0] and 5 < sum(refused) < 60
    paths = [f"data.{s}_annotations={file}" for s in ("train", "val")]
    paths += [f"data.{s}_images={tmp_path / 'images'}" for s in ("train", "val")]
    format_check(check(load_config(Path(__file__).parents[2] / "configs/bccd.yaml", paths)))
    assert content(tmp_path) == before


@pytest.mark.filterwarnings("ignore")
def test_an_image_that_claims_another_size_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(image_files()["a.png"])
    data[16:24] = struct.pack(">II", 13_000, 13_000)  # 500 MB of pixels, just below the limit of PIL
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path = tmp_path / "a.png"
    path.write_bytes(data)

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    facts = read_facts(path, SIZE, True)
    assert facts.width == 13_000 and not facts.problem
    with pytest.raises(DataError, match="is 40x30 in the JSON, 13000x13000 in the file"):
        read_image(path, SIZE)
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    assert read_facts(path, SIZE, True).problem == "unreadable"
    for size in (SIZE, (60_000, 60_000), None):
        with pytest.raises(DataError, match="exceeds limit"):
            read_image(path, size)


def test_what_is_not_a_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for a writer
    assert read_facts(tmp_path / "pipe.png", SIZE, True).problem == "unreadable"
    assert read_facts(tmp_path / ("x" * 300), SIZE, True).detail == "File name too long"
