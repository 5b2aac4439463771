"""The host does not wait for the device within a step, and reads the flags of a step during the next one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_helpers import settings, stop_after, weights

from retina import criterion
from retina.assign import assign
from retina.config import Config, Loss
from retina.config_file import load_config
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches
from retina.losses import focal
from retina.model.anchors import make_anchors
from retina.model.checkpoint import load
from retina.model.retinanet import RetinaNet
from retina.train import loop, step
from retina.train.errors import RunError
from retina.train.schedule import build_optimizer

# Operators whose result the host needs before it can go on: on CUDA it would wait for the device.
WAITING = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "equal",
           "is_nonzero", "item", "repeat_interleave", "bincount"}  # fmt: skip
OVERRIDES = [
    *({"cls": cls} for cls in get_args(Loss.model_fields["cls"].annotation)),
    *({"box": box} for box in get_args(Loss.model_fields["box"].annotation)),
    *({"normalizer": normalizer} for normalizer in get_args(Loss.model_fields["normalizer"].annotation)),
]  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raises on an operator that makes the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        values = [value for value in args if isinstance(value, (list, tuple))]
        boolean = any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for value in values for index in value
        )
        if name in WAITING or (name in ("index", "index_put", "index_put_") and boolean):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step on the CPU takes the paths of CUDA, except for the two kernels, which tests/test_cuda.py runs."""
    monkeypatch.setattr(criterion, "_box_loss", lambda *args, f=criterion._box_loss: f(*args[:-1], True))
    monkeypatch.setattr(focal, "can_read_values", lambda tensor: False)
    for module in ("arguments", "one_pass"):
        monkeypatch.setattr(f"retina.losses.{module}.can_read_values", lambda tensor: False)
    monkeypatch.setattr("retina.losses.mining.sigmoid_focal_loss", partial(focal.sigmoid_focal_loss, impl="reference"))


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda overrides: "-".join(*overrides.items()))
def test_a_step_never_waits(overrides: dict[str, str], tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [f"loss.{name}={value}" for name, value in overrides.items()]
    config = load_config(tiny_yaml, [*flags, "loss.ohem_batch=8", "train.accumulate=2"])
    data = CocoDataset(config.data.train_annotations, config.data.train_images)
    model = RetinaNet(config, data.num_classes)
    optimizer = build_optimizer(model, config.train)
    batches = next(train_batches(data, config, 0))
    assignments = [
        assign(make_anchors(config.anchors, *batch.images.shape[2:], batch.images.device), batch.targets, batch.sizes,
               data.num_classes, config.assign)
        for batch in batches
    ]  # fmt: skip
    unused = iter(assignments)
    monkeypatch.setattr(step, "assign", lambda *_: next(unused))
    before = model.cls_logits.weight.clone()
    with NoWaiting():
        losses = step.train_step(
            model, optimizer, batches, data.num_classes, torch.tensor(100.0), config, 0, log_loss_parts=True
        )
    assert losses["finite"] == 1 and not torch.equal(model.cls_logits.weight, before)


def test_the_test_above_notices_waiting() -> None:
    tensor = torch.arange(4.0)
    for wait in (tensor.sum().item, lambda: bool(tensor.any()), tensor.nonzero, lambda: tensor[tensor > 1]):
        with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
            wait()


@pytest.fixture
def quiet(tiny_yaml: Path, tmp_path: Path) -> Config:
    """Nothing is due before the end, so that the flags of every step but the last are read during the next one."""
    flags = ("train.log_every=100", "train.eval_every=0", "train.checkpoint_every=100")
    return settings(tiny_yaml, tmp_path / "run", *flags)


@pytest.mark.slow
def test_a_diverged_step_ends_the_run_one_step_later(quiet: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CocoDataset(quiet.data.train_annotations, quiet.data.train_images)
    batches = [next(train_batches(data, quiet, 0 + first)) for first in range(3)]
    steps = []

    def train_step(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        steps.append(args[6])
        if args[6] == 2:
            args[0].cls_logits.bias.data.fill_(float("nan"))
        return step.train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(RunError, match=r"step 3: the loss or its gradient is not finite \(loss nan.*nonfinite_step_3"):
        loop.train(quiet)
    assert steps == [0, 1, 2, 3]
    saved = json.loads((quiet.run_dir / "nonfinite_step_3.json").read_text())
    assert saved["image_ids"] == [image_id for batch in batches[2] for image_id in batch.image_ids]
    assert not (quiet.run_dir / "last.pt").exists()


@pytest.mark.slow
def test_a_stop_is_seen_one_step_later_and_changes_no_bit(quiet: Config, tiny_yaml: Path, tmp_path: Path) -> None:
    with stop_after(3):
        loop.train(quiet)
    assert load(quiet.run_dir / "last.pt")["step"] == 4
    loop.train(quiet, resume=True)
    whole = quiet.model_copy(update={"output_dir": str(tmp_path / "whole")})
    loop.train(whole)
    assert weights(quiet.run_dir) == weights(whole.run_dir)
    assert (quiet.run_dir / "metrics.csv").read_bytes() == (whole.run_dir / "metrics.csv").read_bytes()
