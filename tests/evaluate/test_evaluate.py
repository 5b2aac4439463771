from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from retina.config import COCO_METRICS, Config
from retina.data.coco import CocoDataset
from retina.detect import Detections, batched_nms
from retina.evaluate.coco import evaluate_detections, format_metrics, inference_on_dataset
from retina.evaluate.detections import on_image
from retina.model.retinanet import RetinaNet


def perfect_results(dataset: CocoDataset) -> list[dict[str, Any]]:
    results = []
    for record in dataset.records:
        boxes = torch.from_numpy(record.boxes)
        detections = Detections(boxes, torch.full((len(boxes),), 0.9), torch.from_numpy(record.labels))
        size = record.height, record.width
        results += on_image(detections, size, size, dataset.categories).coco_results(record.image_id)
    return results


@pytest.fixture
def val(coco_root: Path) -> CocoDataset:
    return CocoDataset(coco_root / "val.json", coco_root / "val")


def test_perfect_detections_have_ap_one_and_the_original_ids(val: CocoDataset) -> None:
    results = perfect_results(val)
    assert {entry["category_id"] for entry in results} <= set(val.category_ids) == {3, 7, 20}
    evaluation = evaluate_detections(results, val)
    assert evaluation.metrics["AP"] == evaluation.metrics["AP50"] == evaluation.metrics["AR100"] == 1.0
    assert set(evaluation.metrics) == {*COCO_METRICS, "per_class"}
    assert [value for value in evaluation.metrics["per_class"].values() if value is not None] == [1.0] * len(
        evaluation.precision
    )


def test_annotation_ids_may_start_at_zero(val: CocoDataset, tmp_path: Path) -> None:
    tree = json.loads(val.annotations.read_text())
    for i, annotation in enumerate(tree["annotations"]):
        annotation["id"] = i
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(tree))
    assert evaluate_detections(perfect_results(val), CocoDataset(path, val.folder)).metrics["AP"] == 1.0


def test_images_that_could_not_be_read_are_not_counted(val: CocoDataset) -> None:
    record = next(record for record in val.records if len(record.boxes))
    results = [entry for entry in perfect_results(val) if entry["image_id"] != record.image_id]
    assert evaluate_detections(results, val).metrics["AR100"] < 1.0
    assert evaluate_detections(results, val, exclude=[record.image_id]).metrics["AR100"] == 1.0


def test_no_detections_have_ap_zero(val: CocoDataset) -> None:
    metrics = evaluate_detections([], val).metrics
    assert metrics["AP"] == metrics["AR100"] == 0.0


def test_wrong_classes_and_shifted_boxes_lower_the_ap(val: CocoDataset) -> None:
    shifted = [{**entry, "bbox": [entry["bbox"][0] + 3, *entry["bbox"][1:]]} for entry in perfect_results(val)]
    metrics = evaluate_detections(shifted, val).metrics
    assert metrics["AP50"] == 1.0 > metrics["AP"] > 0
    wrong = [{**entry, "category_id": 7 if entry["category_id"] == 3 else 3} for entry in perfect_results(val)]
    assert evaluate_detections(wrong, val).metrics["AP"] < 0.5


def test_the_order_of_images_changes_nothing(val: CocoDataset, tmp_path: Path) -> None:
    tree = json.loads(val.annotations.read_text())
    random.Random(0).shuffle(tree["images"])
    random.Random(1).shuffle(tree["annotations"])
    path = tmp_path / "shuffled.json"
    path.write_text(json.dumps(tree))
    shifted = [{**e, "bbox": [e["bbox"][0] + (i % 4), *e["bbox"][1:]]} for i, e in enumerate(perfect_results(val))]
    expected = evaluate_detections(shifted, val)
    again = list(shifted)
    random.Random(2).shuffle(again)
    assert evaluate_detections(again, CocoDataset(path, val.folder)) == expected


def test_inference_does_not_depend_on_the_batch_size(tiny: Config, val: CocoDataset) -> None:
    torch.manual_seed(0)
    model = RetinaNet(tiny, val.num_classes)
    torch.nn.init.normal_(model.cls_logits.weight, std=0.3)
    batched = inference_on_dataset(model, val, tiny, torch.device("cpu"))[0]
    single_config = tiny.model_copy(update={"train": tiny.train.model_copy(update={"eval_batch": 1})})
    single = inference_on_dataset(model, val, single_config, torch.device("cpu"))[0]
    assert len(batched) == len(single) > 20
    for a, b in zip(batched, single, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.01) and a["score"] == pytest.approx(b["score"], abs=1e-5)
    sizes = {record.image_id: (record.width, record.height) for record in val.records}
    for entry in batched:  # back in pixels of the original image
        x, y, w, h = entry["bbox"]
        width, height = sizes[entry["image_id"]]
        assert -0.01 <= x <= x + w <= width + 0.01 and -0.01 <= y <= y + h <= height + 0.01


def test_nms_is_class_by_class_and_exact_for_many_classes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.9], [0.0, 0.0, 10.0, 9.8]])
    scores, labels = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([3, 900, 900])
    assert batched_nms(boxes, scores, labels, 0.5).tolist() == [1, 0]
    assert batched_nms(boxes[:0], scores[:0], labels[:0], 0.5).tolist() == []


def test_table_shows_percent_and_a_dash_for_none() -> None:
    metrics = dict.fromkeys(COCO_METRICS, 0.1234) | {"APs": None, "per_class": {"cat": 0.5, "none": None}}
    text = format_metrics(metrics)
    assert "12.3" in text and "cat" in text and "50.0" in text and text.count("-") >= 2
