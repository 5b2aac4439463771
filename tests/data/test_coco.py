from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retina.data.annotations import DataError
from retina.data.coco import CocoDataset, read_image


def write_annotations(root: Path, boxes: list[list[float]], **changes: Any) -> tuple[Path, Path]:
    """A JSON of images 5 and 9 with `boxes` on image 5, as annotations 70, 71, ...; and the folder of the images."""
    images = root / "images"
    images.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(images / "a.png")
    tree: dict[str, Any] = {
        "images": [
            {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "a.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 70 + i, "image_id": 5, "category_id": 11 if i % 2 else 4, "bbox": box} for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 11, "name": "dog"}, {"id": 4, "name": "cat"}],
    } | changes
    path = root / "a.json"
    path.write_text(json.dumps(tree))
    return path, images


def test_ids_with_gaps_become_labels_and_empty_images_are_kept(tmp_path: Path) -> None:
    dataset = CocoDataset(*write_annotations(tmp_path, [[1, 2, 10, 20], [0, 0, 5, 5]]))
    assert (dataset.num_classes, dataset.names, dataset.category_ids) == (2, ["cat", "dog"], [4, 11])
    first, second = dataset.records
    assert first.boxes.tolist() == [[1, 2, 11, 22], [0, 0, 5, 5]] and first.labels.tolist() == [0, 1]
    assert second.boxes.shape == (0, 4) and second.labels.shape == (0,)
    assert [
        record.image_id
        for record in CocoDataset(*write_annotations(tmp_path, [[1, 1, 5, 5]]), empty_images="drop").records
    ] == [5]


def test_degenerate_boxes_are_dropped_and_counted(tmp_path: Path) -> None:
    dataset = CocoDataset(*write_annotations(tmp_path, [[1, 2, 10, 0], [3, 3, 4, 4], [39, 1, 9, 3], [50, 5, 4, 4]]))
    assert dataset.records[0].boxes.tolist() == [[3, 3, 7, 7], [39, 1, 40, 4]]
    assert any("2 boxes without area dropped: annotations 70, 73" in note for note in dataset.notes)
    assert any(note.startswith("1 boxes reached") for note in dataset.notes)  # the last one is wholly outside


def test_crowd_boxes_are_ignored_or_dropped_but_never_objects(tmp_path: Path) -> None:
    crowd = [{"id": 1, "image_id": 5, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 1}]
    path, images = write_annotations(tmp_path, [], annotations=crowd)
    record = CocoDataset(path, images).records[0]
    assert len(record.boxes) == 0 and record.ignore.tolist() == [[0, 0, 9, 9]]
    assert len(CocoDataset(path, images, crowd="drop").records[0].ignore) == 0


def test_missing_files_are_named(tmp_path: Path) -> None:
    path, images = write_annotations(tmp_path, [])
    with pytest.raises(DataError, match=r"nowhere.json: no such annotation file"):
        CocoDataset(tmp_path / "nowhere.json", images)
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        CocoDataset(path, tmp_path / "nowhere")


def test_every_image_mode_is_read_as_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8)
    gray = Image.fromarray(ramp)
    files = {
        "gray.png": gray,
        "palette.png": gray.convert("P"),
        "alpha.png": gray.convert("RGBA"),
        "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "cmyk.tiff": gray.convert("RGB").convert("CMYK"),
        "one.png": gray.convert("1"),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        pixels = read_image(tmp_path / name, (40, 30))
        assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
        if name != "one.png":  # 16-bit values are divided, not clipped at 255
            assert np.abs(pixels.astype(int) - ramp[:, :, None]).max() <= 1, name


def test_a_palette_with_transparency_gives_its_colors_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """That of PIL does not name the file."""
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert("P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    colors = np.array(image.convert("RGB"))
    for transparency in (5, bytes(range(0, 240, 5))):
        image.save(tmp_path / "a.png", transparency=transparency)
        assert np.array_equal(read_image(tmp_path / "a.png"), colors)
    assert not recwarn.list


def test_pixels_that_are_not_a_number_are_an_error(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    values = np.full((6, 8), 99, np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert (read_image(tmp_path / "a.tif") == 99).all()
    values[1:3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        DataError, match=r"a\.tif: not readable as an image: 2 of 48 pixels are not a number \(NaN\); set"
    ):
        read_image(tmp_path / "a.tif")
    assert not recwarn.list


def test_exif_rotation_follows_the_size_in_the_json(tmp_path: Path) -> None:
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:10, :10] = 255  # top left of the stored pixels
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: top left moves to top right
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path, exif=exif)
    upright = read_image(path, (30, 40))
    assert upright.shape == (40, 30, 3) and upright[5, 25].all() and not upright[5, 5].any()
    assert np.array_equal(read_image(path, (40, 30)), pixels)
    assert read_image(path).shape == (40, 30, 3)
    with pytest.raises(DataError, match=r"is 50x50 in the JSON, 40x30 in the file"):
        read_image(path, (50, 50))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_swapped_width_and_height_are_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(DataError, match=r"is 30x40 in the JSON, 40x30 in the file"):
        read_image(path, (30, 40))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_pixels_are_those_of_pil(tmp_path: Path, subsampling: int, progressive: bool) -> None:
    rng = np.random.default_rng(subsampling)
    path = tmp_path / "a.jpg"
    for height, width in ((1, 1), (17, 33), (40, 31)):
        smooth = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
        image = Image.fromarray((smooth + rng.integers(0, 55, smooth.shape)).astype(np.uint8))
        image.save(path, quality=80, subsampling=subsampling, progressive=progressive)
        pixels = read_image(path, (width, height))
        assert np.array_equal(pixels, np.array(Image.open(path))) and pixels.flags.c_contiguous
        pixels[:] = 0  # writable


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_jpeg_that_ends_too_early_is_as_with_pil(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000] + end)
    if end:  # libjpeg fills the rest of the image
        assert np.array_equal(read_image(path), np.array(Image.open(path)))
    else:
        with pytest.raises(DataError, match=r"a\.jpg: not readable as an image: .*truncated"):
            read_image(path)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(DataError, match=r"broken\.jpg: not readable as an image"):
        read_image(path)


def test_a_pipe_is_named(tmp_path: Path) -> None:
    """To open it would wait for a process that writes to it."""
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: not readable as an image: it is a pipe"):
        read_image(tmp_path / "a.jpg")


def test_odd_exif_data_does_not_stop_a_rotation(tmp_path: Path) -> None:
    """The maker of the camera as a fraction. PIL cannot write such data again after it rotated an image."""
    entries = struct.pack(">HHLLHHLHH", 0x010F, 5, 1, 38, 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">LH", 8, 2) + entries + struct.pack(">LLL", 0, 1, 3)
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert read_image(path, (30, 40)).shape == (40, 30, 3)
