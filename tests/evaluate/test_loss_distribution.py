from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from retina_tools import loss_distribution as tool

from retina.config import Config
from retina.config_file import config_from_yaml, load_config
from retina.data.coco import CocoDataset, DataError
from retina.device import autocast, pick_device
from retina.evaluate import load
from retina.evaluate import loss_distribution as library
from retina.losses import sigmoid_focal_loss
from retina.model import checkpoint
from retina.model.retinanet import RetinaNet
from retina.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """last.pt of a run of three steps; anchors in the padding are ignored."""
    folder = tmp_path_factory.mktemp("run")
    train(
        load_config(
            tiny_yaml, [f"output_dir={folder}", "train.steps=3", "assign.padding=ignore", "data.pad_multiple=64"]
        )
    )
    return folder / checkpoint.LAST


def open_run(file: Path) -> tuple[Config, CocoDataset, RetinaNet]:
    detector = load(file)
    config = detector.config
    return config, CocoDataset(config.data.val_annotations, config.data.val_images), detector.model


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of the tool."""
    monkeypatch.setattr("sys.argv", ["loss_distribution.py", *map(str, arguments)])
    try:
        return tool.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


@pytest.mark.parametrize(("mean", "spread"), [(-4, 0.5), (-8, 3), (-20, 4)])
def test_histogram_agrees_with_sorting(mean: float, spread: float) -> None:
    """Log-normal losses added in parts: nearly equal ones, and ones from below the lowest bin up to 100."""
    losses = np.random.default_rng(0).lognormal(mean, spread, 200_000)
    histogram = library.LossHistogram()
    for part in np.array_split(losses, 7):
        histogram.add(torch.from_numpy(part).reshape(1, -1))
    exact = np.append(0, np.cumsum(np.sort(losses))) / losses.sum()
    fractions = np.linspace(0, 1, len(losses) + 1)
    assert np.abs(np.interp(fractions, *histogram.curve()) - exact).max() < 0.005
    for fraction in (0.01, 0.1, 0.2):
        expected = 1 - np.interp(1 - fraction, fractions, exact)
        assert histogram.loss_fraction_of_hardest(fraction) == pytest.approx(expected, rel=0.01)


def test_fractions_by_hand() -> None:
    """99 losses of 1 and one of 99: the hardest hundredth has half of the total. Zeros and tiny losses add nothing."""
    histogram = library.LossHistogram()
    histogram.add(torch.tensor([1.0] * 99 + [99.0]))
    assert [histogram.loss_fraction_of_hardest(fraction) for fraction in (0.01, 1)] == pytest.approx([0.5, 1])
    histogram.add(torch.tensor([0.0] * 60 + [1e-30] * 40))
    assert [histogram.loss_fraction_of_hardest(fraction) for fraction in (0.005, 0.5)] == pytest.approx([0.5, 1])


def test_equal_losses_give_a_straight_line() -> None:
    histogram = library.LossHistogram()
    histogram.add(torch.full((1000,), 0.37))
    x = np.linspace(0, 1, 11)
    np.testing.assert_allclose(np.interp(x, *histogram.curve()), x, atol=1e-12)
    assert histogram.loss_fraction_of_hardest(0.2) == pytest.approx(0.2)


def test_sums_are_those_of_the_training_loss(trained: Path) -> None:
    """Computed image by image, over all levels at once, with the loss function of training."""
    config, dataset, model = open_run(trained)
    device = pick_device()
    distribution = library.measure_loss_distribution(model, dataset, config, device)
    sums, counts, anchors = [0.0, 0.0], [0, 0], 0  # of positives and of negatives
    for batch in library.eval_batches(dataset, config):
        batch = batch.to(device)
        boxes = library.make_anchors(config.anchors, *batch.images.shape[2:], device)
        with torch.no_grad(), autocast(device, config.train.precision):
            logits = torch.cat(model(batch.normalized()).logits, dim=1)
        for i, image_id in enumerate(batch.image_ids):
            record = next(record for record in dataset.records if record.image_id == image_id)
            target = library.ground_truth(record, batch.sizes[i])
            target = type(target)(*(part.to(device) for part in target))
            labels = library.assign(boxes, [target], [batch.sizes[i]], 3, config.assign).labels_NR[0]
            anchors += len(labels)
            for index, is_selected in enumerate([(labels >= 0) & (labels < 3), labels == 3]):
                selected = torch.where(is_selected, labels, -1)
                sums[index] += float(sigmoid_focal_loss(logits[i], selected, alpha=None, gamma=2.0, reduction="sum"))
                counts[index] += int(is_selected.sum())
    histograms = [distribution.positives[2.0], distribution.negatives[2.0]]
    assert [histogram.sums.sum() for histogram in histograms] == pytest.approx(sums, rel=1e-4)
    assert [histogram.counts.sum() for histogram in histograms] == counts
    assert distribution.images == 10 and distribution.anchors == anchors > sum(counts)  # some anchors are ignored
    last = distribution.summary()["gammas"][-1]
    assert last["negatives_of_class_loss"] == pytest.approx(sums[1] / sum(sums), rel=1e-4)


def test_boxes_follow_the_resizing(trained: Path) -> None:
    _, dataset, _ = open_run(trained)
    record = next(record for record in dataset.records if len(record.boxes) and len(record.ignore))
    target = library.ground_truth(record, (record.height * 2, record.width * 3))
    for part, original in ((target.boxes, record.boxes), (target.ignore, record.ignore)):
        np.testing.assert_allclose(part.numpy(), original * [3, 2, 3, 2], rtol=1e-6)
    assert target.labels.tolist() == record.labels.tolist()


def test_the_command(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, trained, "--output", tmp_path / "out", "--images", 4) == 0
    output = capsys.readouterr().out
    assert "4 images of" in output and "hardest 10 %" in output
    assert str(tmp_path / "out/loss_distribution.json") in output
    numbers = json.loads((tmp_path / "out/loss_distribution.json").read_text())
    assert numbers["images"] == 4 and numbers["checkpoint"].startswith(str(trained))
    assert [row["gamma"] for row in numbers["gammas"]] == [0, 0.5, 1, 2]
    assert all(0 < value < 1 for row in numbers["gammas"] for name, value in row.items() if name != "gamma")
    hardest = [row["hardest_10_percent_of_negatives"] for row in numbers["gammas"]]
    assert hardest == sorted(hardest)  # gamma shifts the loss to the hard anchors
    with Image.open(tmp_path / "out/loss_distribution.png") as picture:
        picture.load()
        assert picture.width == 1600


def test_images_are_evenly_spaced(trained: Path) -> None:
    _, dataset, _ = open_run(trained)
    ids = [record.image_id for record in dataset.records]
    assert [record.image_id for record in dataset.evenly_spaced(4).records] == [ids[i] for i in (0, 2, 5, 7)]
    everything = dataset.evenly_spaced(99).records
    assert [record.image_id for record in everything] == ids and len(ids) == 10


def test_no_positives_and_nan_are_errors(trained: Path) -> None:
    config, dataset, model = open_run(trained)
    empty = dataset.evenly_spaced(1)
    empty.records = dataset.records.take(np.flatnonzero(dataset.records.num_objects == 0)[:1])
    with pytest.raises(DataError, match="1 images have 0 positive anchors"):
        library.measure_loss_distribution(model, empty, config, pick_device())
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(DataError, match="add up to nan: expected a finite number"):
        library.measure_loss_distribution(model, dataset, config, pick_device())


def test_error_messages(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    for arguments, status, expected in [
        (["no.pt"], 2, "no.pt: no such checkpoint; expected best.pt or last.pt"),
        ([trained, "--images", 0], 2, "--images: given 0, expected a number of at least 1"),
        ([trained, "--output", tmp_path / "file"], 2, "cannot be written to"),
        ([tmp_path / "file"], 1, "not readable as weights"),
        ([tmp_path / "foreign.pt"], 1, "foreign.pt: neither a RetinaNet of this project"),
    ]:
        assert run(monkeypatch, *arguments) == status and expected in capsys.readouterr().err


def test_missing_data_are_named_with_their_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(trained)
    config = config_from_yaml(state["config"])
    without_data = config.model_copy(update={"data": config.data.model_copy(update={"val_annotations": "gone.json"})})
    checkpoint.save(tmp_path / "last.pt", {**state, "config": without_data.to_yaml()})
    assert run(monkeypatch, tmp_path / "last.pt") == 1
    message = capsys.readouterr().err
    assert "gone.json: no such annotation file" in message
    assert f"{tmp_path / 'last.pt'}: its config names this data" in message
    checkpoint.save(tmp_path / "other.pt", {**state, "categories": [[1, "purple"]]})
    assert run(monkeypatch, tmp_path / "other.pt") == 1
    assert "was trained on other categories" in capsys.readouterr().err
