"""Parity with detectron2 and mmdetection: what they computed is in tests/fixtures/parity, see make_parity_fixtures.py.

The weights go through a file in the form of each framework, with the keys that its own model has, and through
`load_pretrained`, so the key tables and the order of the anchors are tested too.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from parity_inputs import (
    BOXES,
    CLASSES,
    LABELS,
    MAX_SIDE,
    RESIZE_FROM,
    SHORT_SIDE,
    SIZES,
    gradient_samples,
    image,
    weights,
)
from torch import Tensor

from retina.assign import assign
from retina.config import Config
from retina.config_file import load_config
from retina.criterion import count_positives, detection_loss, normalizer, update_ema_positives
from retina.data.augment import eval_transform
from retina.data.batch import Batch, Target
from retina.detect import detect
from retina.model.anchors import make_anchors
from retina.model.key_tables import DETECTRON2, MMDETECTION, rename_keys
from retina.model.pretrained import load_pretrained
from retina.model.retinanet import RetinaNet

FIXTURES = Path(__file__).parents[1] / "fixtures/parity"
PRESETS = Path(__file__).parents[2] / "configs/presets"
NAMES = ["a", "b", "c", "d"]


class Case(NamedTuple):
    name: str
    expected: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]  # of the weights, by their keys
    config: Config
    model: RetinaNet
    batch: Batch


def preset(name: str) -> Config:
    overrides = ["loss.ema_start=100"] if name == "detectron2" else []  # of one process; the preset counts 8 GPUs
    return load_config(PRESETS / f"{name}.yaml", overrides)


def padded_batch(config: Config) -> Batch:
    pixels = [image(f"image {i}", size) for i, size in enumerate(SIZES)]
    images = torch.zeros(2, *SIZES[0], 3, dtype=torch.uint8)
    for padded, own in zip(images, pixels, strict=True):
        padded[: own.shape[0], : own.shape[1]] = torch.from_numpy(own)
    targets = [
        Target(torch.from_numpy(boxes), torch.from_numpy(labels), torch.zeros(0, 4))
        for boxes, labels in zip(BOXES, LABELS, strict=True)
    ]
    return Batch(images.permute(0, 3, 1, 2), SIZES, targets, [0, 1], {}, config.data.normalization)


@pytest.fixture(scope="module", params=["detectron2", "mmdetection"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    with np.load(FIXTURES / f"{request.param}.npz") as file:
        about = json.loads(str(file["about"]))
        expected = {key: torch.from_numpy(file[key]) for key in file if key != "about"}
    shapes = {key: tuple(shape) for key, shape in about["shapes"].items()}
    state = weights(shapes, 60 if request.param == "detectron2" else 1)
    file = tmp_path_factory.mktemp("weights") / "file"
    if request.param == "detectron2":  # as in its model zoo
        file.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    else:
        meta = {"meta": {"CLASSES": tuple(NAMES)}}
        torch.save({**meta, "state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, file)
    config = preset(request.param)
    model = RetinaNet(config, CLASSES)
    is_complete, message = load_pretrained(model, config, str(file), NAMES)
    assert is_complete and f"{request.param}'s RetinaNet" in message and "warning" not in message
    return Case(request.param, expected, shapes, config, model.eval(), padded_batch(config))


def in_our_order(case: Case, per_anchor: Tensor, dim: int) -> Tensor:
    """detectron2 has the anchors of a cell size by size, 3 sizes with 3 ratios each; ours are ratio by ratio."""
    if case.name != "detectron2":
        return per_anchor
    return per_anchor.unflatten(dim, (-1, 3, 3)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


def test_inputs_equal(case: Case) -> None:
    images = case.batch.normalized()
    torch.testing.assert_close(images[:, :, ::7, ::5], case.expected["normalized"], rtol=0, atol=1e-4)
    anchors = torch.cat(make_anchors(case.config.anchors, *SIZES[0], torch.device("cpu")))
    torch.testing.assert_close(anchors, in_our_order(case, case.expected["anchors"], 0), rtol=0, atol=1e-4)


def test_matching_equals(case: Case) -> None:
    anchors = make_anchors(case.config.anchors, *SIZES[0], torch.device("cpu"))
    labels = assign(anchors, case.batch.targets, SIZES, CLASSES, case.config.assign).labels_NR
    expected = in_our_order(case, case.expected["labels"], 1)
    assert torch.equal(labels, expected) and {-1, *range(CLASSES), CLASSES} == set(expected.unique().tolist())


@pytest.mark.slow
@torch.inference_mode()
def test_logits_deltas_and_detections_equal(case: Case) -> None:
    outputs = case.model(case.batch.normalized())
    for ours, name in ((outputs.logits, "logits"), (outputs.deltas, "deltas")):
        expected = in_our_order(case, case.expected[name], 1)
        assert expected.std() > 0.4
        torch.testing.assert_close(torch.cat(ours, dim=1), expected, rtol=0, atol=1e-4)
    anchors = make_anchors(case.config.anchors, *SIZES[0], torch.device("cpu"))
    for i, found in enumerate(detect(outputs, anchors, SIZES, case.config.detect)):
        boxes, scores, labels = (case.expected[f"{name} {i}"] for name in ("boxes", "scores", "classes"))
        assert len(found.scores) == len(scores) > 50
        torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-4)
        # Nearly equal scores may be in another order: each of theirs must be one of ours.
        same = ((scores[:, None] - found.scores).abs() < 1e-4) & (labels[:, None] == found.labels)
        same &= (boxes[:, None] - found.boxes).abs().amax(dim=2) < 2e-3  # pixels
        assert same.any(dim=0).all() and same.any(dim=1).all()


@pytest.mark.slow
def test_loss_and_gradients_equal(case: Case) -> None:
    anchors = make_anchors(case.config.anchors, *SIZES[0], torch.device("cpu"))
    assignment = assign(anchors, case.batch.targets, SIZES, CLASSES, case.config.assign)
    positives_N, loss = count_positives(assignment, CLASSES), case.config.loss
    average = update_ema_positives(torch.tensor(loss.ema_start), positives_N.sum(), loss.ema_momentum)
    divisor = normalizer(positives_N, positives_N.sum(), 2, average, loss.normalizer)
    outputs = case.model.train()(case.batch.normalized())
    losses = detection_loss(outputs, anchors, assignment, divisor, loss, case.config.detect.max_ratio)
    case.model.zero_grad()
    losses["loss"].backward()
    case.model.eval()
    for name in ("loss_cls", "loss_box"):
        torch.testing.assert_close(losses[name], case.expected[name], rtol=1e-5, atol=0)

    framework = DETECTRON2 if case.name == "detectron2" else MMDETECTION
    ours = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    theirs = {key.removeprefix("gradient "): value for key, value in case.expected.items() if "gradient" in key}
    name_of = {key: next(iter(rename_keys({key: None}, framework))) for key in theirs}  # type: ignore[dict-item]
    assert set(name_of.values()) == ours.keys()  # the same stages are frozen
    for key, expected in theirs.items():
        gradient = ours[name_of[key]]
        if name_of[key].startswith(("cls_logits", "bbox_reg")) and case.name == "detectron2":
            gradient = gradient.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)  # into their order
        difference = (torch.from_numpy(gradient_samples(gradient.numpy())) - expected).abs().max()
        assert difference < 1e-4 * expected[-1], f"{key}: {difference}, norm {expected[-1]}"


def test_images_are_resized_equally(case: Case) -> None:
    data = case.config.data.model_copy(update={"eval_short_side": SHORT_SIDE, "max_side": MAX_SIDE})
    for i, size in enumerate(RESIZE_FROM):
        resized: Any = eval_transform(image(f"resized {i}", size), data)
        assert np.array_equal(resized, case.expected[f"resized {i}"])
