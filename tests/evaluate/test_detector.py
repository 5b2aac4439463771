"""`retina.load` and the detector that it returns."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision
import torch
from command_helpers import loaded_by, run_main
from PIL import Image
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2

import retina
from retina.config_file import ConfigError, load_config
from retina.data.coco import CocoDataset, read_image
from retina.evaluate import Detector, ImageDetections
from retina.model import WeightsError
from retina.model.retinanet import RetinaNet

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def detector(random_run: Path) -> Detector:
    return retina.load(random_run / "best.pt", device="cpu")


@pytest.fixture(scope="module")
def val(detector: Detector) -> CocoDataset:
    return CocoDataset(detector.config.data.val_annotations, detector.config.data.val_images)


@pytest.fixture(scope="module")
def files(val: CocoDataset) -> list[Path]:
    return [record.path for record in val.records]


def values(detections: ImageDetections) -> tuple[Any, ...]:
    return detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), detections.names


def test_import_is_cheap_and_load_is_the_function() -> None:
    assert loaded_by("retina", {"torch", "numpy", "PIL", "pydantic"}) == "[]"
    assert retina.load.__doc__ is not None and "Args" in retina.load.__doc__
    with pytest.raises(AttributeError, match="module 'retina' has no attribute 'laod'"):
        retina.laod  # noqa: B018


def test_a_list_gives_the_results_of_eval_in_every_bit(
    detector: Detector, val: CocoDataset, files: list[Path], random_run: Path, tmp_path: Path
) -> None:
    """The images have four padded sizes, so batches of two are not in the order of the files."""
    done = run_main("eval.py", "--checkpoint", random_run, "train.eval_batch=2", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    found = detector(files, batch_size=2)
    ours = [
        entry for record, each in zip(val.records, found, strict=True) for entry in each.coco_results(record.image_id)
    ]
    assert ours == json.loads((tmp_path / "detections.json").read_text()) and len(ours) > 100
    assert {entry["category_id"] for entry in ours} == {3, 7, 20}
    single = [detector(file, batch_size=1) for file in files]
    run_main("eval.py", "--checkpoint", random_run, "train.eval_batch=1", "--output", tmp_path)
    ours = [
        entry for record, each in zip(val.records, single, strict=True) for entry in each.coco_results(record.image_id)
    ]
    assert ours == json.loads((tmp_path / "detections.json").read_text())


def test_every_kind_of_input_gives_the_same(detector: Detector, files: list[Path]) -> None:
    pixels = read_image(files[0])
    inputs = [
        str(files[0]),
        Image.open(files[0]),
        pixels,
        np.ascontiguousarray(pixels[:, :, ::-1])[:, :, ::-1],  # as from OpenCV: a view with negative strides
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    expected = values(detector(files[0]))
    assert len(expected[0]) > 5
    for image in inputs:
        assert values(detector(image)) == expected
    assert [values(each) for each in detector(tuple(inputs), batch_size=1)] == [expected] * len(inputs)
    assert detector([]) == []


def test_score_is_the_lowest_score(detector: Detector, files: list[Path]) -> None:
    """NMS starts at the highest score, so a higher threshold keeps the first detections, in every bit."""
    everything = detector(files[0])
    middle = float(everything.scores.unique()[-20:-18].mean())  # between two scores
    confident = detector(files[0], score=middle)
    count = int((everything.scores > middle).sum())
    assert 0 < len(confident) == count < len(everything)
    assert confident.boxes.tolist() == everything.boxes[:count].tolist()
    for wrong in (0, 1, 50, float("nan")):
        with pytest.raises(ValueError, match="expected a number between 0 and 1"):
            detector(files[0], score=wrong)
    with pytest.raises(ValueError, match="batch_size: given 0"):
        detector(files[0], batch_size=0)


def test_boxes_are_in_pixels_of_each_image(detector: Detector, files: list[Path]) -> None:
    for file, found in zip(files, detector(files), strict=True):
        height, width = read_image(file).shape[:2]
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert found.boxes[:, 2].max() > 0.8 * width and found.boxes[:, 3].max() > 0.8 * height
        assert len(found) == len(found.names) == len(found.category_ids) == len(found.labels)
        names = dict(enumerate(["red", "green", "blue"]))
        assert found.names == [names[label] for label in found.labels.tolist()]


def test_threads_get_the_results_of_serial_calls(detector: Detector, files: list[Path]) -> None:
    expected = [values(detector(file)) for file in files]
    assert len({json.dumps(each) for each in expected}) == len(files)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(detector, files * 4))
    assert [values(each) for each in found] == expected * 4


def test_a_detection_that_would_train_batch_norm_is_refused(tiny_yaml: Path, files: list[Path]) -> None:
    """A detection would depend on the images before. All other layers do the same in both modes."""
    config = load_config(tiny_yaml, ["model.norm=batch"])
    learner = Detector(RetinaNet(config, 3), config, [(i, str(i)) for i in range(3)], torch.device("cpu"), "new")
    before = copy.deepcopy(learner.model.state_dict())
    for part in (learner.model, learner.model.backbone):
        learner.model.eval()
        part.train()
        with pytest.raises(
            RuntimeError, match=r"BatchNorm is in training mode, .* call detector\.model\.eval\(\) before"
        ):
            learner(files[0])
    learner.model.eval()
    learner(files[0])
    for norm in ("frozen", "frozen_stats", "group"):
        config = load_config(tiny_yaml, [f"model.norm={norm}"])
        other = Detector(RetinaNet(config, 3), config, [(i, str(i)) for i in range(3)], torch.device("cpu"), "new")
        assert values(other(files[0])) == (other.model.eval(), values(other(files[0])))[1], norm
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_supervision_gets_the_detections(detector: Detector, files: list[Path]) -> None:
    found = detector(files[0])
    converted = found.to_supervision()
    assert isinstance(converted, supervision.Detections) and len(converted) == len(found)
    assert converted.xyxy.tolist() == found.boxes.tolist() and converted.class_id.tolist() == found.labels.tolist()
    assert converted.confidence.tolist() == found.scores.tolist()
    assert list(converted["class_name"]) == found.names
    first = converted[converted["class_name"] == "red"]  # its own selection works
    assert len(first) == found.names.count("red")
    assert len(detector(files[0], score=0.999999).to_supervision()) == 0


def test_a_missing_library_is_named_with_what_to_install(
    detector: Detector, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install supervision"):
        detector(files[0]).to_supervision()


def test_a_run_folder_is_its_best_checkpoint(random_run: Path, tmp_path: Path, detector: Detector) -> None:
    assert retina.load(random_run).file == random_run / "best.pt" and detector.step == 7
    (tmp_path / "last.pt").write_bytes((random_run / "best.pt").read_bytes())
    assert retina.load(str(tmp_path)).source == f"{tmp_path / 'last.pt'}, step 7"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*empty: neither best\.pt nor last\.pt"):
        retina.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such checkpoint or run folder"):
        retina.load("nowhere")


def test_a_config_replaces_that_of_the_checkpoint(random_run: Path, tiny_yaml: Path, files: list[Path]) -> None:
    one = load_config(tiny_yaml, ["detect.max_detections=1"])
    assert len(retina.load(random_run, one)(files[0])) == 1
    assert len(retina.load(random_run, tiny_yaml)(files[0])) > 1
    with pytest.raises(WeightsError, match=r"anchors\.scales was 3, is 2"):
        retina.load(random_run, load_config(tiny_yaml, ["anchors.scales=2"]))
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such configuration file"):
        retina.load(random_run, "gone.yaml")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_wrong_device_is_an_error(random_run: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}'"):
        retina.load(random_run, device=device)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_torchvisions_weights_have_the_settings_of_their_preset(version: str, tmp_path: Path) -> None:
    model = retinanet_resnet50_fpn if version == "v1" else retinanet_resnet50_fpn_v2
    torch.save(model(weights=None, weights_backbone=None).state_dict(), tmp_path / "weights.pth")
    detector = retina.load(tmp_path / "weights.pth", device="cpu")
    preset = load_config(CONFIGS / f"presets/torchvision_{version}.yaml")
    for section in ("data", "anchors", "detect", "train"):
        assert getattr(detector.config, section) == getattr(preset, section)
    assert detector.config.model.model_dump(exclude={"weights"}) == preset.model.model_dump(exclude={"weights"})
    assert detector.categories[18] == (18, "dog") and len(detector.categories) == 91


def test_torchvisions_names_explain_a_failed_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cannot download .*\nFetch .* elsewhere and put it at"):
        retina.load("COCO_V1")
    with pytest.raises(FileNotFoundError, match=r"weights name of resnet18: .*COCO_V1 is a RetinaNet with resnet50"):
        retina.load("COCO_V1", load_config(CONFIGS / "bccd.yaml"))  # before anything is downloaded


def test_a_part_is_chosen_by_a_mask_only() -> None:
    boxes, scores = torch.arange(12.0).view(3, 4), torch.tensor([0.9, 0.5, 0.1])
    found = ImageDetections(boxes, scores, torch.tensor([0, 2, 1]), ["a", "c", "b"], [3, 20, 7])
    part = found.where(torch.tensor([False, True, True]))
    assert (part.names, part.category_ids, part.labels.tolist()) == (["c", "b"], [20, 7], [2, 1])
    with pytest.raises(ValueError, match=r"kept: given torch.int64, expected torch.bool"):
        found.where(scores.argsort())
