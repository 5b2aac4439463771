"""Detectors in a folder of safetensors and JSON, their model cards, and the mixin of huggingface_hub."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
from command_helpers import run_main
from detector_helpers import save_random_detector
from safetensors import safe_open

import retina
from retina.config import COCO_METRICS, Loss
from retina.config_file import config_from_yaml, load_config
from retina.evaluate import Detector
from retina.hub import LOSSES, HubDetector, model_card
from retina.model import WeightsError
from retina.model.checkpoint import digest

METRICS = {name: 0.01 * i for i, name in enumerate(COCO_METRICS, 50)} | {"APl": None}
PER_CLASS = {"red": 0.625, "green": None, "blue": 0.25}


@pytest.fixture(scope="module")
def run(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt of step 7, and an eval.json with that step and another."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    save_random_detector(folder / "best.pt", load_config(tiny_yaml, [f"output_dir={folder}", "name=blood"]))
    entries = [
        {"step": 7, **METRICS, "per_class": PER_CLASS},
        {"step": 9, **METRICS, "AP": 0.9, "per_class": PER_CLASS},
    ]
    (folder / "eval.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def saved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "blood"
    HubDetector(retina.load(run, device="cpu")).save_pretrained(folder)
    return folder


def same(a: Detector, b: Detector, image: Path) -> bool:
    one, two = a(image), b(image)
    assert len(one) > 5 and one.names == two.names
    return digest(a.model.state_dict()) == digest(b.model.state_dict()) and torch.equal(one.boxes, two.boxes)


def test_what_is_saved_is_loaded_in_every_bit(run: Path, saved: Path, coco_root: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    detector, image = retina.load(run, device="cpu"), coco_root / "val/0000.png"
    loaded = retina.load(saved, device="cpu")
    assert same(detector, loaded, image) and same(detector, HubDetector.from_pretrained(saved, device="cpu"), image)
    assert (loaded.step, loaded.categories, loaded.file) == (7, detector.categories, saved)
    assert loaded.source == f"{saved}, step 7"


def test_nothing_tells_about_the_machine(run: Path, saved: Path, coco_root: Path) -> None:
    for path in saved.iterdir():
        content = path.read_bytes()
        assert str(coco_root).encode() not in content and str(run).encode() not in content, path.name
    assert json.loads((saved / "config.json").read_text())["config"]["data"]["val_annotations"] == "val.json"


def test_the_file_alone_has_the_settings(run: Path, saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert config_from_yaml(metadata["config"]).anchors == retina.load(run).config.anchors
    assert json.loads(metadata["categories"]) == [[3, "red"], [7, "green"], [20, "blue"]]


def test_the_model_card_has_the_metrics_of_these_weights(saved: Path) -> None:
    """It is read by huggingface_hub, as its site reads it."""
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.library_name == "retina" and card.data.pipeline_tag == "object-detection"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == pytest.approx({name: value for name, value in METRICS.items() if value is not None})
    assert "after step 7" in card.text and "| 50.0 | 51.0 | 52.0 |" in card.text and "APl" not in card.text
    assert "| red | 62.5 |" in card.text and "| green |" not in card.text
    assert "resnet10" in card.text and "finds 3 classes: red, green, blue" in card.text
    assert 'model.backbone: "resnet10"' in card.text and "model.head_convs: 1" in card.text


def test_metrics_survive_another_save_and_are_left_out_where_unknown(run: Path, saved: Path, tmp_path: Path) -> None:
    again = HubDetector.from_pretrained(saved)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/README.md").read_bytes() == (saved / "README.md").read_bytes()
    assert HubDetector(again).metrics == again.metrics != {}
    shutil.copy(run / "best.pt", tmp_path / "alone.pt")
    HubDetector(retina.load(tmp_path / "alone.pt")).save_pretrained(tmp_path / "alone")
    card = (tmp_path / "alone/README.md").read_text()
    assert "## Metrics" not in card and "model-index" not in card and "## Settings" in card


def test_the_card_of_changed_weights_has_no_metrics_and_names_the_loss(
    tiny_yaml: Path, tmp_path: Path, run: Path
) -> None:
    detector = retina.load(run, device="cpu")
    hub = HubDetector(detector)
    assert hub.metrics["AP"] == METRICS["AP"] and hub.step == 7
    with torch.no_grad():
        detector.model.bbox_reg.bias += 0.5
    for trained in (hub, HubDetector(detector)):  # before the training, or after it
        trained.save_pretrained(tmp_path / "trained")
        saved = json.loads((tmp_path / "trained/config.json").read_text())
        assert saved["step"] is None and saved["metrics"] == {}
        assert "## Metrics" not in (tmp_path / "trained/README.md").read_text()
        shutil.rmtree(tmp_path / "trained")
    hub.step, hub.metrics = 12, METRICS | {"AP": 0.5}  # the user knows them
    hub.save_pretrained(tmp_path / "measured")
    saved = json.loads((tmp_path / "measured/config.json").read_text())
    assert saved["step"] == 12 and saved["metrics"]["AP"] == 0.5
    assert "step 12" in (tmp_path / "measured/README.md").read_text()
    assert HubDetector(detector).metrics == {}
    other = retina.load(shutil.copytree(run, tmp_path / "other"), device="cpu")
    shutil.rmtree(tmp_path / "other")
    assert HubDetector(other).metrics == {}, "the weights in memory can still be saved"
    assert set(LOSSES) == set(get_args(Loss.model_fields["cls"].annotation))
    assert "(resnet10, focal loss)" in model_card(HubDetector(detector))
    save_random_detector(tmp_path / "best.pt", load_config(tiny_yaml, ["loss.cls=ohem"]))
    card = model_card(HubDetector(retina.load(tmp_path / "best.pt")))
    assert "(resnet10, online hard example mining)" in card and "focal-loss" not in card


def test_push_uploads_the_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    def upload(_: object, *, repo_id: str, folder_path: Path, **__: Any) -> str:
        uploaded.update(repo_id=repo_id, files=sorted(path.name for path in Path(folder_path).iterdir()))
        return "url"

    made = huggingface_hub.RepoUrl("https://hub.invalid/me/blood", endpoint="https://hub.invalid")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert HubDetector(retina.load(run)).push_to_hub("me/blood") == "url"
    assert uploaded == {"repo_id": "me/blood", "files": ["README.md", "config.json", "model.safetensors"]}


def test_the_commands_take_the_folder(saved: Path, tiny_yaml: Path, coco_root: Path, tmp_path: Path) -> None:
    done = run_main("predict.py", saved, coco_root / "val", "--output", tmp_path)
    assert done.returncode == 0 and "predictions.json" in done.stdout, done.stderr
    data = [f"data.val_annotations={coco_root}/val.json", f"data.val_images={coco_root}/val"]
    done = run_main("eval.py", "--checkpoint", saved, *data, "--output", tmp_path)
    assert done.returncode == 0 and "AP50" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda content: content[:1000], "not readable as weights"),
        ("model.safetensors", lambda content: content[:-4], "not readable as weights"),
        ("config.json", lambda content: content[:100], "not readable"),
        ("config.json", lambda content: b"[]", "not the settings of a saved detector"),
    ],
)
def test_damaged_folders_are_named(saved: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    shutil.copytree(saved, tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_bytes(change((saved / name).read_bytes()))
    with pytest.raises(WeightsError, match=f"damaged/{name}: {message}"):
        retina.load(tmp_path / "damaged")


def test_missing_libraries_are_named_with_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("huggingface_hub", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(WeightsError, match=r"safetensors files need the package: pip install safetensors"):
        retina.load(saved)
    monkeypatch.delitem(sys.modules, "retina.hub")
    with pytest.raises(
        ImportError, match=r"needs huggingface_hub and safetensors: pip install huggingface_hub safetensors"
    ):
        importlib.import_module("retina.hub")
