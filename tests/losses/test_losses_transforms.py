"""The losses under autocast, torch.compile, torch.func, several processes, other devices; and their modules."""

from __future__ import annotations

import copy
import io
import math
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from retina.losses import (
    FocalNLLLoss,
    FocalStarLoss,
    OHEMLoss,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
    focal_nll_loss,
    focal_star_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

LOGITS = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(1))
WITH_BACKGROUND = torch.where(IDS == 4, 5, IDS)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda x: sigmoid_focal_loss(x, WITH_BACKGROUND, alpha=torch.linspace(0.1, 0.9, 5), gamma=1.5),
    "sigmoid_list": lambda x: sigmoid_focal_loss(x, WITH_BACKGROUND, alpha=[0.1, 0.2, 0.3, 0.4, 0.5]),
    "sigmoid_soft": lambda x: sigmoid_focal_loss(x, LOGITS.softmax(1), gamma=0.5),
    "star": lambda x: focal_star_loss(x, WITH_BACKGROUND),
    "softmax": lambda x: softmax_focal_loss(x, IDS, class_weight=torch.linspace(0.1, 2, 5), label_smoothing=0.1),
    "softmax_ids": lambda x: softmax_focal_loss(x, IDS, class_weight=torch.linspace(0.1, 2, 5)),
    "nll": lambda x: focal_nll_loss(x.log_softmax(1), IDS, gamma=0.5),
}
each = pytest.mark.parametrize("name", LOSSES)


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor = LOGITS) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.slow
@each
def test_compiles_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="inductor")
    torch.testing.assert_close(value_and_gradient(compiled), value_and_gradient(LOSSES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_change_compile_without_a_graph_break(dynamic: bool | None) -> None:
    """A number that changed is symbolic from its second value on, with `dynamic` from the first."""
    losses: list[Callable[[Tensor, float], Tensor]] = [
        lambda x, k: sigmoid_focal_loss(x, WITH_BACKGROUND, avg_factor=k),
        lambda x, k: sigmoid_focal_loss(x, WITH_BACKGROUND, gamma=k / 2, alpha=1 / k),
        lambda x, k: focal_star_loss(x, WITH_BACKGROUND, gamma=k, beta=-k, avg_factor=k),
        lambda x, k: softmax_focal_loss(x, IDS, gamma=k / 2, label_smoothing=0.1 / k),
    ]
    for loss in losses:
        for number in (int, float):
            torch.compiler.reset()
            compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=dynamic)
            for k in (3, 4, 5):
                torch.testing.assert_close(compiled(LOGITS, number(k)), loss(LOGITS, number(k)))


@each
def test_autocast_computes_in_float32(name: str) -> None:
    layer = nn.Linear(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(LOGITS)
        assert logits.dtype == torch.bfloat16
        given = LOSSES[name](logits)
    assert given.dtype == torch.float32
    if name != "nll":  # under autocast the log_softmax of the model itself is float32 already
        torch.testing.assert_close(given, LOSSES[name](logits), rtol=1e-6, atol=0)
    given.backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


def test_vmap_and_grad_of_the_reference() -> None:
    def one(x: Tensor, label: Tensor) -> Tensor:
        return sigmoid_focal_loss(x, label, reduction="sum", impl="reference")

    rows = torch.func.vmap(one)(LOGITS, WITH_BACKGROUND)
    torch.testing.assert_close(rows, sigmoid_focal_loss(LOGITS, WITH_BACKGROUND, reduction="none").sum(1))
    gradients = torch.func.vmap(torch.func.grad(one))(LOGITS, WITH_BACKGROUND)
    expected = value_and_gradient(lambda x: sigmoid_focal_loss(x, WITH_BACKGROUND, reduction="sum"))[1]
    torch.testing.assert_close(gradients, expected)
    hessian = torch.func.hessian(one)(LOGITS[0], WITH_BACKGROUND[0])
    assert (hessian.diagonal() != 0).all() and not (hessian - hessian.diagonal().diag()).any()
    # "auto" selects the reference here
    auto = torch.func.vmap(lambda x, label: sigmoid_focal_loss(x, label, reduction="sum"))(LOGITS, WITH_BACKGROUND)
    torch.testing.assert_close(auto, rows)


def test_vmap_of_the_softmax() -> None:
    rows = torch.func.vmap(softmax_focal_loss)(LOGITS, IDS)
    torch.testing.assert_close(rows, softmax_focal_loss(LOGITS, IDS, reduction="none"))


@each
def test_same_bits_every_run(name: str) -> None:
    first, gradient = value_and_gradient(LOSSES[name])
    for _ in range(5):
        again, gradient_again = value_and_gradient(LOSSES[name])
        assert torch.equal(first, again) and torch.equal(gradient, gradient_again)


def test_same_bits_over_many_chunks() -> None:
    logits, labels = torch.randn(30_000, 40), torch.randint(-1, 41, (30_000,))
    runs = [value_and_gradient(lambda x: sigmoid_focal_loss(x, labels), logits) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


MODULES: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
    "sigmoid": (
        SigmoidFocalLoss(alpha=[0.1, 0.3, 0.5, 0.7, 0.9], gamma=1.0, reduction="sum"),
        lambda: sigmoid_focal_loss(LOGITS, IDS, alpha=[0.1, 0.3, 0.5, 0.7, 0.9], gamma=1.0, reduction="sum"),
    ),
    "sigmoid_plain": (SigmoidFocalLoss(alpha=None), lambda: sigmoid_focal_loss(LOGITS, IDS, alpha=None)),
    "star": (
        FocalStarLoss(gamma=4.0, beta=0.5, alpha=[0.3] * 5),
        lambda: focal_star_loss(LOGITS, IDS, gamma=4.0, beta=0.5, alpha=0.3),
    ),
    "softmax": (
        SoftmaxFocalLoss(gamma=1.0, class_weight=torch.arange(1.0, 6), label_smoothing=0.2),
        lambda: softmax_focal_loss(LOGITS, IDS, gamma=1.0, class_weight=[1, 2, 3, 4, 5], label_smoothing=0.2),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_functions(name: str) -> None:
    module, function = MODULES[name]
    torch.testing.assert_close(module(LOGITS, IDS), function())


def test_modules_keep_all_digits_of_their_values() -> None:
    """Of 1 - 0.9999 only the first three digits are left if 0.9999 is rounded to float32: 1.7e-4 off."""
    expected = 1e-4 * math.log(2)  # of a negative with logit 0
    module = SigmoidFocalLoss(alpha=[0.9999] * 2, gamma=0.0)
    moved = copy.deepcopy(module).float().to("cpu")
    loaded = SigmoidFocalLoss(alpha=[0.5, 0.5], gamma=0.0)
    loaded.load_state_dict(module.state_dict())
    for loss in (module, moved, loaded):
        assert loss(torch.zeros(3, 2), torch.zeros(3, 2)).item() == pytest.approx(expected, rel=1e-6)
    weight = [0.1, 0.7]
    logits, ids = LOGITS[:, :2].double(), IDS % 2
    given = SoftmaxFocalLoss(gamma=0, class_weight=weight)(logits, ids)
    expected = F.cross_entropy(logits, ids, torch.tensor(weight, dtype=torch.float64)).item()
    assert given.item() == pytest.approx(expected, rel=1e-14)


def test_a_checkpoint_with_float32_values_loads() -> None:
    """Earlier versions wrote them."""
    module = SigmoidFocalLoss(alpha=[0.5, 0.5])
    module.load_state_dict({"alpha": torch.tensor([0.25, 0.75])})
    assert module.alpha.tolist() == [0.25, 0.75] and module.alpha.dtype == torch.float64


def test_nll_module() -> None:
    log_probs = LOGITS.log_softmax(1)
    module = FocalNLLLoss(gamma=0.5, class_weight=[1.0, 2, 3, 4, 5], ignore_index=2)
    expected = focal_nll_loss(log_probs, IDS, gamma=0.5, class_weight=[1, 2, 3, 4, 5], ignore_index=2)
    torch.testing.assert_close(module(log_probs, IDS), expected)


def test_modules_take_one_weight_for_all_classes() -> None:
    one = SoftmaxFocalLoss(class_weight=torch.tensor(2.0), reduction="sum")(LOGITS, IDS)
    torch.testing.assert_close(one, 2 * softmax_focal_loss(LOGITS, IDS, reduction="sum"))


def test_weights_are_buffers_and_settings_are_shown() -> None:
    module = SoftmaxFocalLoss(gamma=1.5, class_weight=[1.0, 2.0])
    assert list(module.state_dict()) == ["class_weight"] and not list(module.parameters())
    assert module.to("meta").class_weight.device.type == "meta"  # moves with .to(device)
    assert "class_weight=(2,), gamma=1.5" in repr(module)
    assert "alpha=0.25, gamma=2.0" in repr(SigmoidFocalLoss())
    file = io.BytesIO()
    torch.save(SoftmaxFocalLoss(class_weight=[3.0, 4.0]).state_dict(), file)
    file.seek(0)
    fresh = SoftmaxFocalLoss(class_weight=[1.0, 2.0])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.class_weight.tolist() == [3, 4]
    given = torch.ones(2)
    own = SoftmaxFocalLoss(class_weight=given)
    given.zero_()
    assert own.class_weight.tolist() == [1, 1]


def test_modules_check_their_settings() -> None:
    for build in (SigmoidFocalLoss, SoftmaxFocalLoss, FocalNLLLoss, FocalStarLoss):
        with pytest.raises(ValueError, match="gamma: given -1"):
            build(gamma=-1)
        with pytest.raises(ValueError, match="reduction: given 'foo'"):
            build(reduction="foo")
    for wrong in ({"alpha": 5}, {"alpha": [0.5, 5]}, {"impl": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: given"):
            SigmoidFocalLoss(**wrong)
    for wrong in ({"label_smoothing": 7}, {"class_weight": [-1.0]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: given"):
            SoftmaxFocalLoss(**wrong)
    with pytest.raises(ValueError, match="gamma: given 0"):
        FocalStarLoss(gamma=0)
    with pytest.raises(ValueError, match="batch_size: given 0"):
        OHEMLoss(batch_size=0)


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(5, 5))
    part = slice(rank * 20, rank * 20 + 20)
    logits, ids = model(LOGITS[part]), IDS[part]
    (SigmoidFocalLoss(alpha=[0.3] * 5)(logits, ids) + SoftmaxFocalLoss()(logits, ids)).backward()
    if rank == 0:
        torch.save(model.module.weight.grad, f"{folder}/gradient.pt")
    torch.distributed.barrier()  # neither process ends while the other still communicates
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    (SigmoidFocalLoss(alpha=[0.3] * 5)(model(LOGITS), IDS) + SoftmaxFocalLoss()(model(LOGITS), IDS)).backward()
    both = torch.load(tmp_path / "gradient.pt", weights_only=True)
    torch.testing.assert_close(both, model.weight.grad, rtol=1e-5, atol=1e-7)


def test_a_setting_of_a_module_can_be_assigned() -> None:
    for made, changed, name, value in (
        (SigmoidFocalLoss(), SigmoidFocalLoss(gamma=0.5), "gamma", 0.5),
        (SigmoidFocalLoss(), SigmoidFocalLoss(alpha=[0.3] * 5), "alpha", [0.3] * 5),
        (SoftmaxFocalLoss(), SoftmaxFocalLoss(ignore_index=1), "ignore_index", 1),
    ):
        before = made(LOGITS, IDS)
        setattr(made, name, value)
        assert made(LOGITS, IDS) == changed(LOGITS, IDS) != before, name
    made.gamma = -1.0
    with pytest.raises(ValueError, match="gamma: given -1"):
        made(LOGITS, IDS)


def test_a_setting_of_a_module_can_be_read() -> None:
    module = SigmoidFocalLoss(gamma=1.5, alpha=[0.25, 0.5])
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (same.gamma, same.reduction, same.alpha.tolist()) == (1.5, "mean", [0.25, 0.5])
    assert SigmoidFocalLoss().alpha == 0.25 and OHEMLoss().batch_size == 128
    with pytest.raises(AttributeError, match="has no attribute 'gama'"):
        module.gama  # noqa: B018
