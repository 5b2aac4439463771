"""Files and images that are not what a detector needs: a clear error or a right answer."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import run_main
from detector_helpers import save_random_detector
from PIL import Image

import retina
from retina.config import Config
from retina.config_file import ConfigError, load_config
from retina.data.annotations import DataError
from retina.evaluate import Detector
from retina.model import WeightsError, checkpoint

# Weights


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))  # a zip file, as those of torch are
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (tmp_path / "empty.pt").write_bytes(b"")
    for file in tmp_path.iterdir():
        with pytest.raises(WeightsError, match=f"{file.name}: not readable as weights"):
            retina.load(file)


def test_a_state_dict_of_another_framework_is_named(tmp_path: Path, tiny: Config) -> None:
    torch.save({"model.24.anchors": torch.zeros(1)}, tmp_path / "foreign.pt")
    for config in (None, tiny):
        with pytest.raises(WeightsError, match=r"foreign\.pt: neither a RetinaNet of this project, torchvision"):
            retina.load(tmp_path / "foreign.pt", config)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(random_run: Path, tmp_path: Path, part: float) -> None:
    content = (random_run / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(part * len(content))])
    with pytest.raises(WeightsError, match=r"cut\.pt: not readable as weights"):
        retina.load(tmp_path / "cut.pt")


def test_a_pickle_that_runs_code_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"state": Evil(), "sha256": "", "format": 1}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=r"evil\.pt: not readable as weights"):
        retina.load(tmp_path / "evil.pt")
    done = run_main("predict.py", tmp_path / "evil.pt", tmp_path / "evil.pt")
    assert done.returncode == 1 and "not readable as weights" in done.stderr
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.head_convs=2", "it has model.head_convs=1, the config 2"),
        ("model.backbone=resnet18", "it has model.backbone=resnet10, the config resnet18"),  # another depth
        ("anchors.scales=2", "it has 9 anchors in a cell, the config 6"),
        ("anchors.ratios=[1]", "it has 9 anchors in a cell, the config 3"),
    ],
)
def test_weights_that_do_not_fit_the_settings_are_named(
    tmp_path: Path, tiny_yaml: Path, override: str, message: str
) -> None:
    """In a file that says other settings than those of its tensors, as after an edit."""
    wide = ["model.base_channels=64"]
    file = save_random_detector(tmp_path / "best.pt", load_config(tiny_yaml, wide))
    state = checkpoint.load(file)
    checkpoint.save(file, state | {"config": load_config(tiny_yaml, [*wide, override]).to_yaml()})
    with pytest.raises(WeightsError, match=message):
        retina.load(file)


def test_settings_of_another_version_are_an_error(random_run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(random_run / "best.pt")
    checkpoint.save(tmp_path / "best.pt", state | {"config": state["config"] + "newer: 1\n"})
    with pytest.raises(ConfigError, match="settings of another version"):
        retina.load(tmp_path)


# Images


def test_the_metrics_are_written_before_the_report_fails(random_run: Path, tmp_path: Path) -> None:
    """No image file can be read, so none counts."""
    arguments = ["--checkpoint", random_run, f"data.val_images={tmp_path}", "data.unreadable=skip", "--report"]
    done = run_main("eval.py", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 1 and "not evaluated: " in done.stdout
    assert done.stderr == "error: --report: no image is left to count, so there is nothing to measure\n"
    assert json.loads((tmp_path / "out/metrics.json").read_text())["AP"] is None
    assert (tmp_path / "out/detections.json").read_text() == "[]"


@pytest.fixture(scope="module")
def detector(random_run: Path) -> Detector:
    return retina.load(random_run, device="cpu")


def photo(height: int = 60, width: int = 80) -> Image.Image:
    """Smooth, so that another way to the same pixels gives the same."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def same(detector: Detector, image: Any, expected: Any) -> bool:
    a, b = detector(image), detector(expected)
    assert len(b) > 5
    return torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores)


def test_gray_is_the_image_with_three_equal_channels(detector: Detector, tmp_path: Path) -> None:
    gray = photo().convert("L")
    gray.save(tmp_path / "gray.png")
    three = np.repeat(np.asarray(gray)[:, :, None], 3, axis=2)
    assert same(detector, tmp_path / "gray.png", three) and same(detector, gray, three)


def test_16_bit_gray_is_divided_by_256(detector: Detector, tmp_path: Path) -> None:
    gray = np.asarray(photo().convert("L")).astype(np.uint16)
    Image.fromarray(gray * 256 + 200).save(tmp_path / "deep.png")
    Image.fromarray(gray * 256 + 200).save(tmp_path / "deep.tif")
    three = np.repeat(gray[:, :, None], 3, axis=2).astype(np.uint8)
    assert same(detector, tmp_path / "deep.png", three) and same(detector, tmp_path / "deep.tif", three)


def test_cmyk_is_converted(detector: Detector, tmp_path: Path) -> None:
    """Without black, CMYK is the inverse of RGB."""
    inverse = 255 - np.asarray(photo())
    cmyk = Image.fromarray(np.concatenate([inverse, np.zeros((60, 80, 1), np.uint8)], axis=2), "CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    assert same(detector, tmp_path / "cmyk.tif", photo()) and same(detector, cmyk, photo())
    cmyk.save(tmp_path / "cmyk.jpg", quality=100)
    assert len(detector(tmp_path / "cmyk.jpg")) > 5


def test_alpha_is_dropped(detector: Detector, tmp_path: Path) -> None:
    see_through = photo()
    see_through.putalpha(10)
    see_through.save(tmp_path / "alpha.png")
    assert same(detector, tmp_path / "alpha.png", photo()) and same(detector, see_through, photo())
    palette = photo().convert("P")
    palette.save(tmp_path / "palette.png", transparency=0)
    assert same(detector, tmp_path / "palette.png", palette.convert("RGB"))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_used(detector: Detector, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"moving.{suffix}"
    first, second = photo().convert("P").convert("RGB"), Image.new("RGB", (80, 60), "red")
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(file, save_all=True, append_images=[second], **options)
    with Image.open(file) as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
        expected = opened.convert("RGB")
    assert same(detector, file, expected) and not np.array_equal(expected, second)


def test_a_file_is_rotated_as_its_tag_says_and_an_opened_image_is_not(detector: Detector, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees, as a phone held upright writes it
    photo().save(tmp_path / "phone.png", exif=exif)
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    assert upright.size == (60, 80) and same(detector, tmp_path / "phone.png", upright)
    assert same(detector, Image.open(tmp_path / "phone.png"), photo())


@pytest.mark.parametrize("resize", ["opencv", "torchvision"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 20_000), (300, 20_000)])
def test_extreme_sizes_are_detected_on(
    size: tuple[int, int], resize: str, random_run: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    detector = retina.load(random_run, load_config(tiny_yaml, [f"data.resize={resize}"]), device="cpu")
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "image.png", compress_level=1)
    found = detector(tmp_path / "image.png")
    assert torch.isfinite(found.boxes).all() and (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([*size, *size]) + 0.01 * max(size)).all()


def test_an_image_too_large_to_decode_is_refused(detector: Detector, tmp_path: Path) -> None:
    """20,000 x 20,000: PIL's limit against files that fill the memory. The header alone says the size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"huge\.png: not readable as an image: Image size \(400000000 pixels\)"):
        detector(tmp_path / "huge.png")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "the image: 5 x 0 pixels: there is nothing to detect on"),
        (torch.zeros((3, 5, 0), dtype=torch.uint8), "the image: 0 x 5 pixels"),
        (Image.new("RGB", (0, 7)), "the image: 0 x 7 pixels"),
        (np.zeros((4, 5), np.uint8), r"given an array uint8 \(4, 5\), expected uint8 \(H, W, 3\)"),
        (np.zeros((4, 5, 4), np.uint8), r"given an array uint8 \(4, 5, 4\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"given an array uint8 \(2, 4, 5, 3\)"),
        (np.zeros((4, 5, 3), np.float32), "given an array float32"),
        (torch.zeros(3, 4, 5), r"given a tensor torch.float32 \(3, 4, 5\), expected torch.uint8 .* \(x \* 255\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"given a tensor torch.uint8 \(4, 5, 3\)"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), r"a batch a list: list\(x\)"),
        ("nowhere.jpg", r"nowhere\.jpg: not readable as an image: .*No such file"),
    ],
)
def test_what_is_no_image_is_explained(detector: Detector, image: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detector(image)
    with pytest.raises(DataError, match=message.replace("the image:", "image 1 of the list:")):
        detector([photo(), image])


def test_other_types_and_damaged_images_are_errors(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="given int, expected a path, a PIL image"):
        detector(5)  # type: ignore[call-overload]
    photo(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cut\.jpg: not readable as an image"):
        detector(tmp_path / "cut.jpg")
    with pytest.raises(DataError, match="the image: not readable as an image: image file is truncated"):
        detector(Image.open(tmp_path / "cut.jpg"))
