from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_helpers import free_port, settings, stop_after, weights

from retina.config import Config, Train
from retina.config_file import load_config
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches
from retina.model import checkpoint
from retina.model.retinanet import RetinaNet
from retina.train.errors import RunError
from retina.train.loop import train
from retina.train.schedule import build_optimizer, learning_rate, update_ema
from retina.train.step import train_step
from retina.train.step_flags import StepFlags

pytestmark = pytest.mark.slow
RESNET18 = ("model.backbone=resnet18", "model.base_channels=64")


def test_files_of_a_run(tiny: Config) -> None:
    last = train(tiny)
    names = {path.name.split(".tfevents")[0] for path in tiny.run_dir.iterdir()}
    assert names == {".lock", "config.yaml", "last.pt", "previous.pt", "best.pt", "metrics.csv", "eval.json",
                     "detections.json", "events.out"}  # fmt: skip
    assert load_config(tiny.run_dir / "config.yaml") == tiny
    rows = list(csv.DictReader((tiny.run_dir / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    for row in rows:
        both = float(row["loss_pos"]) + float(row["loss_neg"])
        assert both == pytest.approx(float(row["loss_cls"]), rel=1e-5) and min(both, float(row["loss_neg"])) > 0
    evaluations = json.loads((tiny.run_dir / "eval.json").read_text())
    assert [entry["step"] for entry in evaluations] == [3, 6] and evaluations[-1] == last
    board = EventAccumulator(str(tiny.run_dir))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/lr", "train/positives", "val/AP", "val_class/red"} <= set(tags["scalars"])
    assert {"val/precision_recall_at_iou_50", "detections/0000.png"} <= set(tags["images"])
    state = checkpoint.load(tiny.run_dir / checkpoint.LAST)
    assert state["categories"] == [[3, "red"], [7, "green"], [20, "blue"]]


def test_pictures_of_equal_names_in_two_folders_have_a_tag_each(
    tiny_yaml: Path, tmp_path: Path, coco_root: Path
) -> None:
    tree = json.loads((coco_root / "val.json").read_text())
    for i, entry in enumerate(tree["images"]):
        (tmp_path / f"images/{i}").mkdir(parents=True)
        shutil.copy(coco_root / "val" / entry["file_name"], tmp_path / f"images/{i}/same.png")
        entry["file_name"] = f"{i}/same.png"
    (tmp_path / "val.json").write_text(json.dumps(tree))
    data = (f"data.val_annotations={tmp_path}/val.json", f"data.val_images={tmp_path}/images")
    train(settings(tiny_yaml, tmp_path / "run", "train.steps=1", "train.warmup_steps=0", *data))
    board = EventAccumulator(str(tmp_path / "run"))
    board.Reload()
    pictures = [tag for tag in board.Tags()["images"] if tag.startswith("detections/")]
    assert len(pictures) == 6 and all(re.fullmatch(r"detections/\d/same\.png", tag) for tag in pictures)


def test_equal_seeds_give_equal_weights_and_others_do_not(
    tiny: Config, tiny_yaml: Path, tmp_path: Path, finished_run: Path
) -> None:
    train(tiny)
    assert weights(tiny.run_dir) == weights(finished_run)
    train(settings(tiny_yaml, tmp_path / "other", "seed=1"))
    assert weights(tmp_path / "other") != weights(finished_run)


def test_loss_falls_and_gradients_are_accumulated_exactly(tiny: Config, tiny_yaml: Path, tmp_path: Path) -> None:
    flags = ["train.steps=24", "train.eval_every=0", "train.lr=2e-3", "train.optimizer=adamw", "data.zoom=[1,1]",
             "data.photometric=0", "train.schedule=cosine", "train.checkpoint_every=1000"]  # fmt: skip
    runs = {name: settings(tiny_yaml, tmp_path / name, *flags, f"train.accumulate={name}") for name in ("1", "2")}
    train(runs["1"])
    with stop_after(3):
        train(runs["2"])
    losses = {}
    for name, config in runs.items():
        losses[name] = [float(row["loss"]) for row in csv.DictReader((config.run_dir / "metrics.csv").open())]
    assert sum(losses["1"][-5:]) < 0.8 * sum(losses["1"][:5])
    assert losses["2"] == pytest.approx(losses["1"][:3], rel=1e-3)


def test_non_finite_loss_stops_before_the_update_and_names_the_images(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CocoDataset(tiny.data.train_annotations, tiny.data.train_images)
    model = RetinaNet(tiny, data.num_classes)
    with torch.no_grad():
        model.cls_logits.bias.fill_(float("nan"))  # type: ignore[union-attr]
    before = checkpoint.digest(model.state_dict())
    optimizer = build_optimizer(model, tiny.train)
    batches = next(train_batches(data, tiny, 0))
    losses = train_step(model, optimizer, batches, data.num_classes, torch.tensor(100.0), tiny, 0)
    assert losses["finite"] == 0
    assert checkpoint.digest(model.state_dict()) == before
    flags = StepFlags(torch.device("cpu"))
    assert not flags.read()
    flags.send(1, losses, batches)
    with pytest.raises(
        RunError, match=r"step 1: the loss or its gradient is not finite \(loss nan, .*nothing was updated"
    ):
        flags.read()

    monkeypatch.setattr("retina.model.retinanet.prior_bias", lambda pi: float("nan"))
    with pytest.raises(RunError, match=r"image ids are in .*nonfinite_step_1\.json"):
        train(tiny)
    saved = json.loads((tiny.run_dir / "nonfinite_step_1.json").read_text())
    assert saved["image_ids"] == [i for batch in batches for i in batch.image_ids]


def test_random_frozen_stages_are_refused(tiny_yaml: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"frozen_stages=1 .* would stay random"):
        train(settings(tiny_yaml, tmp_path / "run", "model.frozen_stages=1"))


def test_frozen_statistics_without_weights_are_refused(tiny_yaml: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"model\.norm=frozen .* model\.norm=batch"):
        train(settings(tiny_yaml, tmp_path / "run", "model.norm=frozen"))


def test_missing_weights_are_explained(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'nowhere.pth' is neither a file nor a weights name of resnet18: IMAGENET1K_V1"
    ):
        train(settings(tiny_yaml, tmp_path / "a", "model.weights=nowhere.pth", *RESNET18))

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"put it at .*cache/hub/checkpoints/resnet18-.*\.pth"):
        train(settings(tiny_yaml, tmp_path / "b", "model.weights=IMAGENET1K_V1", *RESNET18))
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a weights name of resnet10: it has none"):
        train(settings(tiny_yaml, tmp_path / "c", "model.weights=IMAGENET1K_V1"))


def test_learning_rate_by_hand() -> None:
    config = Train(steps=90, lr=0.01, batch_size=8, warmup_steps=10, warmup_factor=0.1)
    assert learning_rate(0, config) == pytest.approx(0.0005)  # half the reference batch, a tenth of the peak
    assert learning_rate(5, config) == pytest.approx(0.005 * 0.55)
    assert [learning_rate(step, config) for step in (10, 59, 60, 79, 80, 89)] == pytest.approx(
        [0.005, 0.005, 0.0005, 0.0005, 0.00005, 0.00005]
    )
    cosine = config.model_copy(update={"schedule": "cosine"})
    assert [learning_rate(step, cosine) for step in (10, 50, 90)] == pytest.approx([0.005, 0.0025, 0.0])


def test_a_run_that_is_all_warm_up_says_so(tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(tiny_yaml, tmp_path / "run", "train.steps=1", "train.warmup_steps=1"))
    assert "the learning rate only rises, to 1e-05 in the last of 1 steps" in capsys.readouterr().out


def test_settings_without_effect_are_named(tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train.steps=1", "train.eval_every=0", "train.early_stop=2", "data.short_side=[48,640]"]
    train(settings(tiny_yaml, tmp_path / "run", *flags))
    output = capsys.readouterr().out
    assert "train.early_stop=2 does nothing: the only evaluation is at the end" in output
    assert "data.max_side=96 is below a short side of 640: no image becomes that large" in output


def test_one_process_under_torchrun_is_like_none(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("train.steps=1", "model.norm=batch")  # BatchNorm over several processes would need a card
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RunError, match=r"WORLD_SIZE, but not .*LOCAL_RANK.*; start several processes with torchrun"):
        train(settings(tiny_yaml, tmp_path / "a", *flags))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    train(settings(tiny_yaml, tmp_path / "b", *flags))
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    train(settings(tiny_yaml, tmp_path / "c", *flags))
    assert weights(tmp_path / "b") == weights(tmp_path / "c")


def test_norm_layers_have_their_own_weight_decay(tiny_yaml: Path) -> None:
    config = load_config(tiny_yaml, ["train.norm_weight_decay=0", "train.weight_decay=0.1"])
    model = RetinaNet(config, 3)
    plain, norms = build_optimizer(model, config.train).param_groups
    assert (plain["weight_decay"], norms["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 1 for p in norms["params"])
    assert len(plain["params"]) + len(norms["params"]) == len(list(model.parameters()))


def test_average_of_weights_by_hand() -> None:
    model, average = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(3.0)
        average.weight.fill_(1.0)
    model.num_batches_tracked.fill_(7)  # type: ignore[operator]
    update_ema(average, model, 0.75, step=10_000)
    assert average.weight.item() == pytest.approx(1.5) and int(average.num_batches_tracked) == 7  # type: ignore[arg-type]
    update_ema(average, model, 0.75, step=0)  # at step 0, the decay is 1/10
    assert average.weight.item() == pytest.approx(0.1 * 1.5 + 0.9 * 3)


def test_torchrun_trains_like_one_process(tiny_yaml: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools/train.py"
    # No score is above the threshold yet, so the AP is 0 twice, and both processes must end at step 2.
    flags = [tiny_yaml, "train.steps=9", "train.eval_every=1", "train.early_stop=1"]
    one_process = settings(tiny_yaml, tmp_path / "one", *map(str, flags[1:]))
    train(one_process)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tool, *flags]
    run = subprocess.run(
        [*command, f"output_dir={tmp_path}/two"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        expected = pytest.approx({k: float(v) for k, v in one.items()}, rel=1e-4, abs=1e-6)  # loss_neg is a difference
        assert {k: float(v) for k, v in two.items()} == expected
    results = [json.loads((tmp_path / name / "eval.json").read_text())[-1]["AP"] for name in ("one", "two")]
    assert results[0] == pytest.approx(results[1], abs=1e-3) and len(rows[0]) == 2


def test_errors_of_the_data_are_named_before_the_first_step(tiny_yaml: Path, tiny: Config, tmp_path: Path) -> None:
    tree = json.loads(Path(tiny.data.train_annotations).read_text())
    tree["annotations"][3]["bbox"][2] = -5
    (tmp_path / "train.json").write_text(json.dumps(tree))
    tree = json.loads(Path(tiny.data.val_annotations).read_text())
    missing = tree["images"][2]["file_name"] = "nowhere.png"
    (tmp_path / "val.json").write_text(json.dumps(tree))
    files = [f"data.train_annotations={tmp_path / 'train.json'}", f"data.val_annotations={tmp_path / 'val.json'}"]
    with pytest.raises(RunError) as raised:
        train(settings(tiny_yaml, tmp_path / "run", *files))
    message = str(raised.value)
    assert "error box-negative in train: boxes with a negative width or height (1): annotation 4 of" in message
    assert "error image-missing in val: image files that do not exist (1)" in message and missing in message
    assert "python tools/check_data.py" in message and not (tmp_path / "run/metrics.csv").exists()


def test_validation_on_training_images_or_without_objects_is_said(
    tiny_yaml: Path, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, flags = tiny.data, ("train.steps=1", "train.warmup_steps=0")
    same = (f"data.val_annotations={data.train_annotations}", f"data.val_images={data.train_images}/../train")
    train(settings(tiny_yaml, tmp_path / "same", *flags, *same))
    assert "images are training images too: their AP measures what was learned by heart" in capsys.readouterr().out
    tree = json.loads(Path(data.val_annotations).read_text()) | {"annotations": []}
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(tree))
    train(settings(tiny_yaml, tmp_path / "empty", *flags, f"data.val_annotations={empty}"))
    output = capsys.readouterr().out
    assert "val: no objects, so the evaluations will have no AP" in output and "training images too" not in output
    assert "no AP, because no validation image has an object that counts for it: no best.pt" in output
    assert not (tmp_path / "empty/best.pt").exists()
    with pytest.raises(RunError, match=r"empty\.json: no objects to train on"):
        train(
            settings(
                tiny_yaml, tmp_path / "none", f"data.train_annotations={empty}", f"data.train_images={data.val_images}"
            )
        )
