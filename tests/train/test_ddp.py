"""Two gloo processes at global batch size B equal one process at batch size B: same losses, same gradients."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from retina.config import Config
from retina.config_file import load_config
from retina.data.batch import Batch, Target
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches
from retina.model.retinanet import RetinaNet
from retina.train.step import train_step

pytestmark = pytest.mark.slow
NORMALIZERS = ("batch", "image", "ema")


class RecordGradients(torch.optim.SGD):
    """An optimizer that stores its gradients and updates nothing."""

    gradients: dict[int, torch.Tensor]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.gradients = {i: p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None}


def one_step(config: Config, data: CocoDataset, rank: int, world: int, only_first: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = RetinaNet(config, data.num_classes).double()  # else the rounding of the sums is as large as the bound
    plain.register_forward_pre_hook(lambda _, images: tuple(each.double() for each in images))
    model: nn.Module = DistributedDataParallel(plain) if world > 1 else plain
    optimizer = RecordGradients(plain.parameters(), lr=1.0, fused=True)
    (batches,) = train_batches(data, config, 0, rank, world)
    if only_first:  # all objects of the batch are in its first half: the second process has no positives
        batches = without_objects(batches, rank, world)
    losses = train_step(model, optimizer, batches, data.num_classes, torch.tensor(100.0), config, 0)
    return {"losses": {k: v.item() for k, v in losses.items()}, "gradients": optimizer.gradients}


def without_objects(batches: list[Batch], rank: int, world: int) -> list[Batch]:
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    images = sum(len(batch.image_ids) for batch in batches) * world
    position, result = rank * images // world, []
    for batch in batches:
        targets = []
        for target in batch.targets:
            targets.append(target if position < images // 2 else empty)
            position += 1
        result.append(batch._replace(targets=targets))
    return result


def worker(rank: int, port: int, yaml: Path, output: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    data = CocoDataset(load_config(yaml).data.train_annotations, load_config(yaml).data.train_images)
    results = {
        f"{mode} {only_first} {accumulate}": one_step(settings(yaml, mode, accumulate), data, rank, 2, only_first)
        for mode in NORMALIZERS
        for only_first in (False, True)
        for accumulate in (1, 2)
    }
    if rank == 0:
        torch.save(results, output)
    distributed.barrier()  # neither process ends while the other still communicates
    distributed.destroy_process_group()


def settings(yaml: Path, mode: str, accumulate: int) -> Config:
    return load_config(yaml, ["train.steps=1", f"loss.normalizer={mode}", f"train.accumulate={accumulate}"])


@pytest.fixture(scope="module")
def two_processes(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = tmp_path_factory.mktemp("ddp") / "results.pt"
    multiprocessing.spawn(worker, (port, tiny_yaml, str(output)), nprocs=2)
    results: dict[str, Any] = torch.load(output, weights_only=True)
    return results


@pytest.fixture(scope="module")
def one_process(tiny_yaml: Path) -> dict[str, Any]:
    config = settings(tiny_yaml, "batch", 1)
    data = CocoDataset(config.data.train_annotations, config.data.train_images)
    return {
        f"{mode} {only_first}": one_step(settings(tiny_yaml, mode, 1), data, 0, 1, only_first)
        for mode in NORMALIZERS
        for only_first in (False, True)
    }


@pytest.mark.parametrize("only_first", [False, True], ids=["all", "one process without positives"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", NORMALIZERS)
def test_two_processes_equal_one(
    one_process: dict[str, Any], two_processes: dict[str, Any], mode: str, accumulate: int, only_first: bool
) -> None:
    one = one_process[f"{mode} {only_first}"]
    two = two_processes[f"{mode} {only_first} {accumulate}"]
    for name in ("loss", "loss_cls", "loss_box", "positives"):
        assert two["losses"][name] == pytest.approx(one["losses"][name], rel=1e-5), name
    assert two["gradients"].keys() == one["gradients"].keys()
    for index, gradient in one["gradients"].items():
        difference = (two["gradients"][index] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert difference < 1e-9 or gradient.norm() < 1e-12, f"parameter {index}: {difference}"


@pytest.mark.parametrize("only_first", [False, True])
def test_the_moving_average_counts_the_step_that_it_divides(one_process: dict[str, Any], only_first: bool) -> None:
    """As in detectron2, whose first step divides by 0.9 * 100 + 0.1 * its own positives."""
    batch, average = (one_process[f"{mode} {only_first}"]["losses"] for mode in ("batch", "ema"))
    positives = batch["positives"] * 4  # images
    assert average["loss"] * (90 + 0.1 * positives) == pytest.approx(batch["loss"] * positives, rel=1e-5)
