"""Weights of all sources in a model: what is kept, what the log says, and weights that do not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

import retina
from retina.config import Config
from retina.config_file import load_config
from retina.evaluate import build_detector, default_source
from retina.model import checkpoint
from retina.model.key_tables import DETECTRON2, MSRA_RESNET, rename_keys
from retina.model.pretrained import load_pretrained
from retina.model.retinanet import RetinaNet
from retina.model.weights import network_settings, read_weights
from retina.model.weights_file import WeightsError

FIXTURES = Path(__file__).parents[1] / "fixtures/parity"
PRESETS = Path(__file__).parents[2] / "configs/presets"
SMALL = {"backbone": "resnet10", "base_channels": 32, "weights": None, "norm": "batch", "channels": 16, "head_convs": 1}
CPU = torch.device("cpu")


def config(**model: Any) -> Config:
    width = {"base_channels": 64} if "backbone" in model else {}
    return Config.model_validate({"model": SMALL | width | model})


def build(settings: Config, classes: int, seed: int = 0) -> RetinaNet:
    torch.manual_seed(seed)
    return RetinaNet(settings, classes)


def save_own(path: Path, model: RetinaNet, settings: Config, names: list[str], **more: Any) -> str:
    categories = [[i + 1, name] for i, name in enumerate(names)]
    state = {"model": model.state_dict(), "ema": {}, "step": 7, "config": settings.to_yaml(), "categories": categories}
    checkpoint.save(path, state | more)
    return str(path)


def as_mmdetection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [
        ("backbone.body.", "backbone."), ("backbone.fpn.inner_blocks.", "neck.lateral_convs."),
        ("backbone.fpn.layer_blocks.", "neck.fpn_convs."), ("backbone.fpn.extra_blocks.p6", "neck.fpn_convs.3.conv"),
        ("backbone.fpn.extra_blocks.p7", "neck.fpn_convs.4.conv"), ("cls_head.", "bbox_head.cls_convs."),
        ("box_head.", "bbox_head.reg_convs."), ("cls_logits.", "bbox_head.retina_cls."),
        ("bbox_reg.", "bbox_head.retina_reg."),
    ]  # fmt: skip
    result = {}
    for key, value in state.items():
        old, new = next(pair for pair in pairs if key.startswith(pair[0]))
        renamed = new + key[len(old) :]
        in_list = new.startswith(("neck.lateral", "bbox_head.cls_convs", "bbox_head.reg_convs")) or new == pairs[2][1]
        result[
            renamed.replace(".0.weight", ".conv.weight").replace(".0.bias", ".conv.bias") if in_list else renamed
        ] = value
    return result


def test_class_outputs_in_common_are_kept(tmp_path: Path) -> None:
    trained, fresh = build(config(), 3, seed=1), build(config(), 4, seed=2)
    file = save_own(tmp_path / "last.pt", trained, config(), ["RBC", "WBC", "Platelets"])
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    is_complete, message = load_pretrained(fresh, config(), file, ["dog", "Platelets", "cat", "RBC"])
    assert not is_complete
    assert message == (
        f"weights: the checkpoint of step 7 from {file}; "
        "kept 2 of 4 class outputs (Platelets, RBC); dog, cat start from the prior"
    )
    after, theirs = fresh.state_dict(), trained.state_dict()
    for key in after:
        if not key.startswith("cls_logits"):
            assert torch.equal(after[key], theirs[key]), key
            continue
        new, old, initial = (state[key].unflatten(0, (9, -1)) for state in (after, theirs, before))
        assert torch.equal(new[:, 1], old[:, 2]) and torch.equal(new[:, 3], old[:, 0])
        assert torch.equal(new[:, 0], initial[:, 0]) and torch.equal(new[:, 2], initial[:, 2])
    is_complete, message = load_pretrained(fresh, config(), file, ["RBC", "WBC", "Platelets", "WBC"])
    assert is_complete and message.endswith("kept 4 of 4 class outputs")


def test_the_moving_average_of_a_checkpoint_is_used(tmp_path: Path) -> None:
    trained, average, fresh = (build(config(), 1, seed) for seed in (1, 2, 3))
    file = save_own(tmp_path / "last.pt", trained, config(), ["a"], ema=average.state_dict())
    load_pretrained(fresh, config(), file, ["a"])
    assert torch.equal(fresh.bbox_reg.weight, average.bbox_reg.weight)


def test_other_settings_are_in_the_log(tmp_path: Path) -> None:
    other = Config.model_validate(
        {"data": {"normalization": "caffe_bgr"}, "anchors": {"octave_base": 2}, "model": SMALL}
    )
    file = save_own(tmp_path / "last.pt", build(other, 1), other, ["a"])
    _, message = load_pretrained(build(config(), 1), config(), file, ["a"])
    assert "warning: these weights were trained with data.normalization=caffe_bgr (here imagenet)" in message
    assert "anchors.octave_base=2.0 (here 4.0)" in message
    _, message = load_pretrained(build(other, 1), other, file, ["a"])
    assert "warning" not in message


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"backbone": "resnet34"}, "it has model.backbone=resnet34, the config resnet10"),
        ({"base_channels": 64}, "model.base_channels=64, the config 32"),
        ({"channels": 24, "head_convs": 2}, "model.channels=24, the config 16; model.head_convs=2, the config 1"),
        ({"p6_from": "p5"}, "model.p6_from=p5, the config c5"),
        ({"norm": "group"}, "model.norm=group, the config batch"),
        ({"head_norm": "group"}, "model.head_norm=group, the config none"),
    ],
    ids=str,
)
def test_weights_of_another_network_name_the_settings(tmp_path: Path, other: dict[str, Any], expected: str) -> None:
    file = save_own(tmp_path / "last.pt", build(config(**other), 1), config(**other), ["a"])
    with pytest.raises(WeightsError, match=expected):
        load_pretrained(build(config(), 1), config(), file, ["a"])


def test_weights_of_another_number_of_anchors_name_the_settings(tmp_path: Path) -> None:
    other = Config.model_validate({"anchors": {"scales": 2}, "model": SMALL})
    file = save_own(tmp_path / "last.pt", build(other, 1), other, ["a"])
    expected = r"it has 6 anchors in a cell, the config 9 \(anchors.scales=3 times 3 anchors.ratios\)"
    with pytest.raises(WeightsError, match=expected):
        load_pretrained(build(config(), 1), config(), file, ["a"])


@pytest.mark.parametrize("backbone", ["resnet10", "resnet18", "resnet34", "resnet50", "resnext50_32x4d"])
def test_shapes_show_the_settings(backbone: str) -> None:
    state = build(config(backbone=backbone, head_norm="group", p6_from="p5"), 2).state_dict()
    assert network_settings(state) == {
        "model.backbone": backbone, "model.base_channels": 64, "model.norm": "batch", "model.channels": 16,
        "model.p6_from": "p5", "model.head_convs": 1, "model.head_norm": "group", "anchors": 9,
    }  # fmt: skip


def test_mmdetections_files_with_and_without_names(tmp_path: Path) -> None:
    trained, fresh = build(config(), 3, seed=1), build(config(), 3, seed=2)
    state = as_mmdetection(trained.state_dict())
    settings = config(relu_before_p7=False)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "no_names.pth")
    is_complete, message = load_pretrained(fresh, settings, str(tmp_path / "no_names.pth"), ["a", "b", "c"])
    assert is_complete and "name no classes; their 3 class outputs are taken in their order" in message
    assert torch.equal(fresh.cls_logits.weight, trained.cls_logits.weight)
    is_complete, message = load_pretrained(build(settings, 2), settings, str(tmp_path / "no_names.pth"), ["a", "b"])
    assert not is_complete and "kept 0 of 2 class outputs; a, b start from the prior" in message
    meta = {"dataset_meta": {"classes": ("c", "b", "a")}, "cfg": "model = dict(backbone=dict(style='caffe'))"}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "names.pth")
    is_complete, message = load_pretrained(fresh, settings, str(tmp_path / "names.pth"), ["a", "b", "c"])
    assert is_complete and "data.normalization=caffe_bgr (here imagenet)" in message
    assert "configs/presets/mmdetection.yaml" in message
    expected = trained.cls_logits.weight.unflatten(0, (9, 3)).flip(1).flatten(0, 1)
    assert torch.equal(fresh.cls_logits.weight, expected)


@pytest.mark.parametrize("classes", [80, 91])
def test_coco_classes_are_known_by_their_number(tmp_path: Path, classes: int) -> None:
    trained = build(config(), classes, seed=1)
    torch.save(as_mmdetection(trained.state_dict()), tmp_path / "file.pth")
    settings = config(relu_before_p7=False)
    weights = read_weights(str(tmp_path / "file.pth"))
    detector = build_detector(weights, settings, device="cpu")
    model, categories = detector.model, detector.categories
    assert len(categories) == classes and (88, "teddy bear") in categories and (90, "toothbrush") in categories
    assert torch.equal(model.cls_logits.weight, trained.cls_logits.weight)
    model = build_detector(weights, settings, [(1, "zebra"), (2, "person")], "cpu").model
    names = [name for _, name in categories]
    theirs = trained.cls_logits.bias.unflatten(0, (9, classes))[:, [names.index("zebra"), names.index("person")]]
    assert torch.equal(model.cls_logits.bias, theirs.flatten())
    with pytest.raises(WeightsError, match=r"not a detector for these classes .* platelet start from the prior"):
        build_detector(weights, settings, [(1, "zebra"), (2, "platelet")], "cpu")


def test_safetensors(tmp_path: Path) -> None:
    trained = build(config(), 2, seed=1)
    meta = {"config": config().to_yaml(), "categories": json.dumps([[4, "a"], [9, "b"]])}
    state = {key: value.contiguous() for key, value in trained.state_dict().items()}
    save_file(state, tmp_path / "own.safetensors", meta)
    save_file(as_mmdetection(state), tmp_path / "mm.safetensors")
    for name in ("own", "mm"):
        fresh = build(config(), 2, seed=2)
        is_complete, _ = load_pretrained(fresh, config(), str(tmp_path / f"{name}.safetensors"), ["a", "b"])
        assert is_complete and torch.equal(fresh.cls_logits.weight, trained.cls_logits.weight)
    assert read_weights(str(tmp_path / "own.safetensors")).categories == [(4, "a"), (9, "b")]
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(
        WeightsError, match=r"bare.safetensors: weights of this project without their config .* and categories"
    ):
        read_weights(str(tmp_path / "bare.safetensors"))


def test_classifiers_of_torchvision(tmp_path: Path) -> None:
    classifier = torchvision.models.resnet18(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    model, settings = build(config(backbone="resnet18"), 1), config(backbone="resnet18")
    is_complete, message = load_pretrained(model, settings, str(tmp_path / "resnet18.pth"), ["a"])
    assert not is_complete and "torchvision's ImageNet classifier" in message and "warning" not in message
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
    with pytest.raises(WeightsError, match=r"has model.backbone=resnet18, the config resnet34"):
        load_pretrained(build(config(backbone="resnet34"), 1), config(), str(tmp_path / "resnet18.pth"), ["a"])
    with pytest.raises(WeightsError, match=r"torchvision's ImageNet classifier is not a detector"):
        retina.load(tmp_path / "resnet18.pth", config())


@pytest.mark.parametrize(("backbone", "names"), [("resnet18", "IMAGENET1K_V1, DEFAULT"), ("resnet10", "it has none")])
def test_detectors_of_another_backbone_are_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, backbone: str, names: str
) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    expected = rf"'COCO_V1' is neither a file nor a weights name of {backbone}: {names}.* \(COCO_V1 .* with resnet50\)$"
    with pytest.raises(FileNotFoundError, match=expected):
        load_pretrained(build(config(backbone=backbone), 1), config(backbone=backbone), "COCO_V1", ["a"])


@pytest.mark.parametrize(
    ("backbone", "names"),
    [("resnet34", "IMAGENET1K_V1, DEFAULT"), ("resnet50", "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, COCO_V1, COCO_V2")],
)
def test_only_names_of_the_backbone_are_offered(backbone: str, names: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"'COCO' is neither a file nor a weights name of {backbone}: {names}$"
    ):
        read_weights("COCO", backbone)


def test_a_folder_in_place_of_a_file_names_the_file_to_give(tmp_path: Path) -> None:
    """The one that `retina.load` takes. The identity of a study's runs needs a file."""
    expected = f"model.weights: {tmp_path} is a folder, expected a file of weights"
    for name in (None, "model.safetensors", "last.pt", "best.pt"):
        if name is not None:
            save_own(tmp_path / name, build(config(), 1), config(), ["a"])
        with pytest.raises(FileNotFoundError) as error:
            load_pretrained(build(config(), 1), config(), str(tmp_path), ["a"])
        assert str(error.value) == expected + (f"; give {tmp_path / name}" if name else " or a name")
    assert retina.load(tmp_path, device="cpu").file == tmp_path / "best.pt"


def test_msras_classifier(tmp_path: Path) -> None:
    """detectron2 maps its names to its own (the fixture has what it gave), and its table maps those to ours."""
    with np.load(FIXTURES / "detectron2.npz") as file:
        names: dict[str, str] = json.loads(str(file["about"]))["msra"]
    unused = ("conv1_b", "fc1000_w", "fc1000_b")
    values: dict[str, Any] = {name: name for name in names}
    ours = rename_keys(values, MSRA_RESNET)
    theirs = {f"backbone.bottom_up.{names[name]}": name for name in names if name not in unused}
    assert ours == rename_keys(theirs, DETECTRON2) and len(ours) == 265  # type: ignore[arg-type]

    settings = load_config(PRESETS / "paper.yaml")
    trained, fresh = (build(settings, 1, seed).backbone.body for seed in (1, 2))
    assert {f"backbone.body.{key}" for key in trained.state_dict()} == ours.keys()
    arrays = {ours[f"backbone.body.{key}"]: value.numpy() for key, value in trained.state_dict().items()}
    arrays |= {name: np.zeros(1, np.float32) for name in unused}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(arrays))
    model = build(settings, 1, seed=2)
    is_complete, message = load_pretrained(model, settings, str(tmp_path / "R-50.pkl"), ["a"])
    assert not is_complete and "MSRA's ImageNet classifier" in message and "warning" not in message
    for key, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key]), key
    assert not torch.equal(fresh.conv1.weight, trained.conv1.weight)


def test_a_file_that_names_no_framework_is_explained_by_the_command(tiny_yaml: Path, tmp_path: Path) -> None:
    torch.save({"model.24.anchors": torch.zeros(2)}, tmp_path / "yolo.pt")
    settings = load_config(tiny_yaml, [f"output_dir={tmp_path}/run", f"model.weights={tmp_path}/yolo.pt"])
    with pytest.raises(WeightsError, match=r"yolo.pt: neither a RetinaNet of this project"):
        retina.load(default_source(settings), settings)


def test_what_is_known_of_the_settings(tmp_path: Path) -> None:
    """An own checkpoint knows all of them, other files what their shapes and their framework say."""
    settings = config(relu_before_p7=False)
    own = read_weights(save_own(tmp_path / "last.pt", build(settings, 1), settings, ["a"]))
    assert own.known_settings == {**settings.flat(), **own.known_settings} and own.preset is None
    assert own.known_settings["train.lr"] == 0.01
    torch.save(as_mmdetection(build(settings, 3).state_dict()), tmp_path / "mm.pth")
    theirs = read_weights(str(tmp_path / "mm.pth"))
    assert theirs.preset == "mmdetection" and theirs.categories is None and theirs.classes == 3
    changed = [f"{key}={value}" for key, value in theirs.known_settings.items()]
    loaded = load_config(PRESETS / "mmdetection.yaml", changed)  # is a config, and the weights fit it
    detector = retina.load(tmp_path / "mm.pth", device="cpu")  # no config: the preset, with what the file shows
    assert detector.config == loaded and [name for _, name in detector.categories] == ["class 0", "class 1", "class 2"]
    _, message = load_pretrained(RetinaNet(loaded, 3), loaded, str(tmp_path / "mm.pth"), ["a", "b", "c"])
    assert "warning" not in message and loaded.model.backbone == "resnet10" and loaded.model.channels == 16


def test_a_part_of_a_detector_is_refused(tmp_path: Path) -> None:
    state = as_mmdetection(build(config(), 1).state_dict())
    torch.save({key: value for key, value in state.items() if not key.startswith("neck")}, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match=r"file.pth: missing: backbone.fpn.inner_blocks"):
        load_pretrained(build(config(), 1), config(), str(tmp_path / "file.pth"), ["a"])
