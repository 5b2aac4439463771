"""Pictures: the right pixels change, and incomplete result files still give a picture."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from command_helpers import loaded_by
from PIL import Image, ImageColor

from retina.data.coco import read_image
from retina.plots.boxes import draw_boxes
from retina.plots.detections import plot_detections
from retina.plots.result_files import read_metrics
from retina.plots.run import plot_run
from retina.plots.style import PALETTE, class_color
from retina.shapes.outlines import CLASSES

GRAY = Image.new("RGB", (400, 300), (128, 128, 128))


def changed(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) != 128).any(axis=2)


def test_outline_changes_pixels_at_the_box_and_not_inside() -> None:
    image = GRAY.copy()
    drawn = np.asarray(draw_boxes(image, [[50, 100, 251, 221]], ["dog"]))
    assert (np.asarray(image) == 128).all(), "the input image is unchanged"
    color = ImageColor.getrgb(class_color("dog"))
    # the box covers columns 50 to 250 and rows 100 to 220; the label is above it
    for row, column in [(160, 50), (160, 250), (220, 150), (100, 200), (220, 50), (220, 250)]:
        assert tuple(drawn[row, column]) == color, (row, column)
    for row, column in [(160, 49), (160, 251), (221, 150)]:
        assert tuple(drawn[row, column]) != color, (row, column)
    difference = changed(Image.fromarray(drawn))
    assert not difference[106:215, 56:245].any(), "inside"
    assert not difference[:80].any() and not difference[226:].any(), "above and below"
    assert not difference[:, :44].any() and not difference[:, 256:].any(), "left and right"
    assert difference[82:99, 55:75].any(), "the label"


def test_box_beyond_the_image_is_clipped_to_it() -> None:
    drawn = draw_boxes(GRAY, [[-50, 100, 900, 900]], ["dog"])
    color = ImageColor.getrgb(class_color("dog"))
    assert drawn.getpixel((0, 200)) == drawn.getpixel((399, 200)) == drawn.getpixel((200, 299)) == color


def test_dashed_outline_has_gaps_and_corners() -> None:
    solid = changed(draw_boxes(GRAY, [[50, 100, 250, 220]], ["dog"]))[219, 50:250]
    dashed = changed(draw_boxes(GRAY, [[50, 100, 250, 220]], ["dog"], dashed=[True]))[219, 50:250]
    assert solid.all()
    assert 0.3 < dashed.mean() < 0.8
    assert dashed[0] and dashed[-1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_mode_any_box_any_name(mode: str) -> None:
    """Boxes outside the image, without area or with swapped corners, and long names, in images from tiny to large."""
    boxes = [(0, 0, 8, 8), (-50, -50, 900, 900), (5, 5, 5, 5), (7, 7, 2, 2), (-9, -9, -3, -3), (990, 990, 999, 999)]
    labels = ["a name much longer than the image is wide", "é", "Ж", "", "two\nlines\r", "e"]
    for size in [(8, 8), (30, 200), (900, 60)]:
        drawn = draw_boxes(Image.new(mode, size), boxes, labels, [0.1, 0.9, 0.2, 0.3, 0.4, 1.0])
        assert drawn.size == size and drawn.mode == "RGB"


def test_labels_lie_inside_the_image_and_do_not_overlap() -> None:
    """Boxes at all edges, two of them almost the same: the pixels of the label appear once for each box."""
    color = ImageColor.getrgb(class_color("Platelets"))
    single = np.asarray(draw_boxes(GRAY, [(150, 120, 152, 122)], ["Platelets"]))
    rows, columns = np.nonzero((single == color).all(axis=2))
    label = single[rows.min() : 120, columns.min() : columns.max() + 1]  # the pixels above the box
    assert label.shape[0] >= 10 and 40 < label.shape[1] < 100

    boxes = [(0, 0, 120, 60), (330, 0, 400, 60), (0, 250, 80, 300), (380, 240, 400, 300), (0, 0, 118, 58)]
    drawn = np.asarray(draw_boxes(GRAY, boxes, ["Platelets"] * 5))
    windows = np.lib.stride_tricks.sliding_window_view(drawn, label.shape)[:, :, 0]
    candidates = np.argwhere((windows[:, :, 0, :, :] == label[0]).all(axis=(2, 3)))
    assert sum((windows[row, column] == label).all() for row, column in candidates) == 5


def test_lines_and_text_scale_with_the_image() -> None:
    small, large = (
        draw_boxes(GRAY.resize(size), [[0.25 * size[0], 0.4 * size[1], 0.75 * size[0], 0.8 * size[1]]], ["dog"])
        for size in [(400, 300), (4000, 3000)]
    )
    ratio = changed(large).mean() / changed(small).mean()
    assert 0.6 < ratio < 1.5


def test_highest_score_is_drawn_on_top() -> None:
    box = [[50, 100, 250, 220]] * 2
    for scores, winner in [([0.9, 0.2], "dog"), ([0.2, 0.9], "cat")]:
        drawn = draw_boxes(GRAY, box, ["dog", "cat"], scores)
        assert drawn.getpixel((50, 160)) == ImageColor.getrgb(class_color(winner))


def test_no_boxes_and_wrong_lengths() -> None:
    assert not changed(draw_boxes(GRAY, [], [])).any()
    assert not changed(draw_boxes(GRAY, np.zeros((0, 4)), [], [])).any()
    for labels, scores, dashed in [([], None, None), (["a"], [], None), (["a"], [0.5], [True, False])]:
        with pytest.raises(ValueError, match=r"1 boxes, but"):
            draw_boxes(GRAY, [[0, 0, 5, 5]], labels, scores, dashed=dashed)
    with pytest.raises(ValueError, match=r"not finite"):
        draw_boxes(GRAY, [[0, 0, 5, float("nan")]], ["a"])


def test_colors_depend_only_on_the_name_and_differ_for_common_classes() -> None:
    frequent = ["person", "chair", "car", "book", "bottle", "cup", "dining table", "bowl", "traffic light", "handbag"]
    for names in (["RBC", "WBC", "Platelets"], list(CLASSES), frequent):
        assert len({class_color(name) for name in names}) == len(names)
    assert class_color("person") == "#0072B2", "the colors of earlier figures do not change"
    assert len(set(PALETTE)) == len(PALETTE)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Six gray images: a gray JPEG, a tall palette PNG, ...; the third with a crowd, the last one empty."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number, (size, mode) in enumerate([((90, 60), "L"), ((60, 90), "P")] + [((90, 60), "RGB")] * 4, start=1):
        name = f"{number}.{'png' if mode == 'P' else 'jpg'}"
        Image.new(mode, size, 128).save(tmp_path / "images" / name)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for index in range(number if number < 6 else 0):
            box = [5 + 3 * index, 20, 30, 25]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1 + index % 2,
                    "bbox": box,
                    "area": 750,
                    "iscrowd": int(number == 3),
                }
            )
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(coco))
    (tmp_path / "detections.json").write_text(
        json.dumps(
            [{"image_id": 5, "category_id": 1, "bbox": [20, 20, 40, 30], "score": score} for score in (0.9, 0.2)]
        )
    )
    return tmp_path


def render(scenes: Path, detections: str = "detections.json", **settings: float) -> np.ndarray:
    output = plot_detections(
        scenes / "gt.json", scenes / "images", scenes / detections, scenes / "new/out.png", read_image, **settings
    )
    assert output == scenes / "new/out.png"
    with Image.open(output) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_picture_has_the_expected_size_and_is_deterministic(scenes: Path) -> None:
    first = render(scenes)
    assert 2400 < first.shape[1] < 2800 and 900 < first.shape[0] < 2600  # 3 rows of 2 pairs
    assert (first == render(scenes)).all()
    assert 1200 < render(scenes, count=2).shape[1] < 1400  # 2 rows of 1 pair


def test_threshold_and_empty_detections(scenes: Path) -> None:
    (scenes / "none.json").write_text("[]")
    without, one, two = render(scenes, "none.json"), render(scenes), render(scenes, score=0.1)
    color = np.array(ImageColor.getrgb(class_color("a")))
    painted = [(np.abs(picture - color).sum(axis=2) == 0).sum() for picture in (without, one, two)]
    assert painted[0] < painted[1] < painted[2], "the boxes of the ground truth; one and two more"
    middle = one.shape[1] // 2
    assert (without[60:] != one[60:]).any(axis=(0, 2)).nonzero()[0].min() < middle
    assert (render(scenes, "none.json", count=1)[:, 700:] == color).all(axis=2).sum() == 0, "right: no box"


def test_images_with_several_objects_are_preferred(scenes: Path) -> None:
    """One picture of the whole set: image 5 has the most objects of two classes, and the only detection."""
    color = np.array(ImageColor.getrgb(class_color("a")))
    rows, columns = np.nonzero((render(scenes, count=1)[:, 680:] == color).all(axis=2))
    # the right image begins at column 680; its 90 pixels are 640 wide; the box ends at pixel 20 + 40
    assert columns.min() == 20 * 640 // 90
    assert columns.max() == (20 + 40) * 640 // 90
    assert np.ptp(rows[columns == columns.max()]) + 1 == pytest.approx(30 * 640 / 90, abs=1.5)


def test_images_are_read_as_for_the_detector(scenes: Path) -> None:
    """Rotated by their EXIF tag; a file that cannot be read is gray, and its caption says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 60x90, shown 90x60
    Image.new("RGB", (60, 90), (255, 0, 0)).save(scenes / "images/5.jpg", exif=exif)
    red = (render(scenes, count=1)[:, :, :2] == (254, 0)).all(axis=2)
    assert red.any(axis=0).sum() > 1200  # both pictures are as wide as they can be
    (scenes / "images/5.jpg").write_bytes(b"no image")
    picture = render(scenes, count=1)
    assert (picture == (0xDD, 0xDD, 0xDD)).all(axis=2).sum() > 300_000
    (scenes / "images/5.jpg").unlink()


def test_crowds_are_dashed(scenes: Path) -> None:
    color = ImageColor.getrgb(class_color("a"))
    before = (render(scenes, count=6) == color).all(axis=2).sum()
    text = (scenes / "gt.json").read_text()
    (scenes / "gt.json").write_text(text.replace('"iscrowd": 1', '"iscrowd": 0'))
    assert (render(scenes, count=6) == color).all(axis=2).sum() > before


def test_detections_of_another_data_set_and_missing_images_are_errors(scenes: Path) -> None:
    for wrong in ({"image_id": 99, "category_id": 1}, {"image_id": 1, "category_id": 9}):
        (scenes / "wrong.json").write_text(json.dumps([{"bbox": [0, 0, 1, 1], "score": 1.0, **wrong}]))
        with pytest.raises(ValueError, match=r"an image or a category that .*gt\.json lacks"):
            render(scenes, "wrong.json")
    with pytest.raises(ValueError, match=r"nothing to show"):
        render(scenes, count=0)
    (scenes / "images/5.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"5\.jpg, which .*gt\.json names"):
        render(scenes)


CSV_COLUMNS = ["step", "loss", "loss_cls", "loss_box", "lr", "positives", "grad_norm"]
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def write_run(folder: Path, steps: int, evaluations: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows([step, 2 / step, 1.5 / step, 0.5 / step, 0.01, 9, 1.0] for step in range(1, steps + 1))
    if evaluations is not None:
        (folder / "eval.json").write_text(json.dumps(evaluations))
    return folder


def evaluation(step: int, per_class: dict[str, float | None], value: float | None = 0.5) -> dict:
    return {"step": step, **dict.fromkeys(METRICS, value), "per_class": per_class}


def picture(run: Path) -> np.ndarray:
    with Image.open(plot_run(run, run / "plots/run.png")) as image:
        assert image.format == "PNG" and 1000 < image.width < 2000 and 600 < image.height < 1200
        return np.asarray(image.convert("RGB"))


@pytest.mark.slow
def test_run_at_every_stage_and_with_missing_values(tmp_path: Path) -> None:
    classes = {f"class {index}": index / 80 for index in range(80)}
    stages = {
        "nothing": write_run(tmp_path / "0", 0),
        "one step": write_run(tmp_path / "1", 1),
        "no evaluation": write_run(tmp_path / "2", 120),
        "an empty list": write_run(tmp_path / "3", 120, []),
        "one": write_run(tmp_path / "4", 120, [evaluation(100, {"a": 0.5, "$5_$10_": 0.2, "c": None})]),
        "nulls": write_run(
            tmp_path / "5", 120, [evaluation(100, {"a": None}, None), evaluation(120, {"a": None}, None)]
        ),
        "80 classes": write_run(
            tmp_path / "6", 120, [evaluation(100, classes), evaluation(120, classes | {"x": None})]
        ),
    }
    pictures = {name: picture(run) for name, run in stages.items()}
    assert pictures["80 classes"].shape[1] > pictures["one"].shape[1]
    assert (pictures["one"] == ImageColor.getrgb(class_color("a"))).all(axis=2).sum() > 1000, "a bar"
    dark = [(pictures[name] == (0x22, 0x22, 0x22)).all(axis=2).sum() for name in ("nothing", "no evaluation", "one")]
    assert dark[0] < 20 < 200 < dark[1], "a curve"
    assert dark[2] > dark[1] + 1000, "a bar for the AP of a single evaluation"


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 60, [evaluation(60, {"a": 0.5})])
    expected = picture(run)
    lines = (run / "metrics.csv").read_text().splitlines()
    repeated = [f"{step},9,9,9,9,9,9" for step in range(31, 40)]  # before the crash; the resumed run repeats them
    (run / "metrics.csv").write_text("\n".join(lines[:31] + repeated + lines[31:] + ["61,0.1"]))
    (run / "eval.json").write_text(json.dumps([evaluation(60, {"a": 0.9}, 0.9), evaluation(60, {"a": 0.5})]))
    assert (picture(run) == expected).all()


def test_read_metrics_gives_the_columns_asked_for(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", 3) / "metrics.csv"
    path.write_text(path.read_text() + "2,8,8,8,8,7,8\n4,1")  # a resumed step, and an incomplete line
    columns = read_metrics(path, ["step", "positives", "loss"])
    assert {name: values.tolist() for name, values in columns.items()} == {
        "step": [1, 2, 3], "positives": [9, 7, 9], "loss": [2, 8, 2 / 3],
    }  # fmt: skip


def test_broken_run_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*metrics\.csv"):
        plot_run(tmp_path, tmp_path / "x.png")
    run = write_run(tmp_path / "run", 3)
    (run / "eval.json").write_text("[{")
    with pytest.raises(ValueError, match=r"eval\.json is not JSON"):
        plot_run(run, tmp_path / "x.png")
    (run / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['loss_box', 'loss_cls', 'lr'\]"):
        plot_run(run, tmp_path / "x.png")
    (run / "metrics.csv").write_text(",".join(CSV_COLUMNS) + "\n1,high,1,1,1,1,1\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 2: not numbers"):
        plot_run(run, tmp_path / "x.png")


def test_a_loss_that_is_not_finite_does_not_hide_the_others(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0)
    rows = [f"{step},{0.5 if step % 2 else 'nan'},inf,0,0.01,0,nan\n" for step in range(1, 151)]  # mean of 3 steps
    with (run / "metrics.csv").open("a") as file:
        file.writelines(rows)
    assert (picture(run) == (0x22, 0x22, 0x22)).all(axis=2).sum() > 200


@pytest.mark.slow
def test_import_loads_neither_torch_nor_pyplot() -> None:
    assert loaded_by("retina.plots", {"torch", "matplotlib.pyplot"}) == "[]"
