"""The one-pass path of the softmax focal loss, compared with 50 digits and with plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_softmax import exact_loss_and_gradient
from torch import Tensor
from torch.autograd import forward_ad

from retina.losses import softmax_focal_loss
from retina.losses.arguments import Reduction

# Rows of few and of many classes, with and without further dimensions; most have several chunks of the size set below.
SHAPES = [(300, 5), (90, 70), (3, 200), (6, 5, 40), (700, 3, 2), (2, 70, 9, 8), (1, 3, 1000), (7,)]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retina.losses.softmax_cpu.CHUNK_ELEMENTS", 1000)


@pytest.fixture
def on_plain_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Calls a function so that the loss takes plain autograd."""

    def call(function: Callable[[], Tensor]) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr("retina.losses.softmax.takes_one_pass", lambda _: False)
            return function()

    return call


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits up to about 20, and class ids of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    dim = 1 if len(shape) > 1 else 0
    logits = (5 * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)
    ids = torch.randint(0, shape[dim], shape[:dim] + shape[dim + 1 :], generator=generator)
    if ids.dim():
        ids.view(-1)[::7] = -100
    return logits.requires_grad_(), ids


def value_and_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    factors = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad((loss * factors).sum(), logits)[0]


@all_shapes
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_equals_plain_autograd(
    shape: tuple[int, ...], reduction: Reduction, gamma: float, on_plain_path: Callable[..., Tensor]
) -> None:
    logits, ids = problem(shape)
    weight = torch.linspace(0, 2, shape[min(1, len(shape) - 1)], dtype=torch.float64)

    def loss() -> Tensor:
        return softmax_focal_loss(logits, ids, gamma=gamma, class_weight=weight, reduction=reduction)

    given, expected = (value_and_gradient(each, logits) for each in (loss(), on_plain_path(loss)))
    assert given[0].shape == expected[0].shape and given[1].shape == logits.shape
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@all_shapes
def test_lower_precisions(dtype: torch.dtype, reduction: Reduction, shape: tuple[int, ...]) -> None:
    logits, ids = problem(shape, dtype)
    given = value_and_gradient(softmax_focal_loss(logits, ids, reduction=reduction), logits)
    exact = logits.detach().double().requires_grad_()
    expected = value_and_gradient(softmax_focal_loss(exact, ids, reduction=reduction), exact)
    assert given[0].dtype == torch.float32 and given[1].dtype == dtype
    torch.testing.assert_close(given[0].double(), expected[0], rtol=1e-6, atol=1e-30)
    relative = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # s_j has its own rounding
    torch.testing.assert_close(given[1].double(), expected[1], rtol=relative, atol=6e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0])
def test_logits_with_rounded_differences_match_fifty_digits(gamma: float, scale: float) -> None:
    """The difference of two logits near 40 has an error of 2e-6, which 1 - p near p = 1 would repeat."""
    logits = (scale * torch.randn(60, 4, generator=torch.Generator().manual_seed(1))).requires_grad_()
    ids = torch.cat([logits[:30].argmax(dim=1), torch.arange(30) % 4])
    losses = softmax_focal_loss(logits, ids, gamma=gamma, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    for i, target in enumerate(ids.tolist()):
        value, slopes = exact_loss_and_gradient(logits[i].tolist(), target, gamma)
        assert losses[i].item() == pytest.approx(value, rel=4e-7, abs=1e-37)
        assert gradient[i].tolist() == pytest.approx(slopes, abs=max(4e-7 * max(map(abs, slopes)), 1e-37))


@pytest.mark.parametrize("kind", ["ids", "plain", "distribution"])
@pytest.mark.parametrize(("classes", "rest"), [(10, -12.0), (50, -13.7), (500, -11.7), (500, -10.965)])
def test_many_equal_logits_beside_a_large_one_round_to_no_side(
    classes: int, rest: float, kind: str, on_plain_path: Callable[..., Tensor]
) -> None:
    """In a float32 sum with the largest term each of them is rounded alike; 500 of them then miss 1e-5 of the loss."""
    logits = torch.full((1, classes), rest)
    logits[0, :2] = torch.tensor([0.0, 8.0])
    ids = torch.tensor([1])
    target = torch.nn.functional.one_hot(ids, classes).float() if kind == "distribution" else ids
    for gamma in (2.0, 5.0):
        x = logits.clone().requires_grad_()
        call = partial(softmax_focal_loss, x, target, gamma=gamma)
        loss = on_plain_path(call) if kind == "plain" else call()
        (gradient,) = torch.autograd.grad(loss, x)
        value, slopes = exact_loss_and_gradient(logits[0].tolist(), 1, gamma)
        bound = 1e-6 if kind == "distribution" else 4e-7
        assert loss.item() == pytest.approx(value, rel=bound)
        assert gradient[0].tolist() == pytest.approx(slopes, abs=bound * max(map(abs, slopes)))


def test_logits_in_any_memory_order() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 70, (4, 6, 5), generator=generator)
    plain = torch.randn(4, 70, 6, 5, generator=generator)
    last = plain.contiguous(memory_format=torch.channels_last)
    wide = torch.randn(4, 90, 7, 9, generator=generator)
    wide[:, 10:80, 1:, ::2] = plain
    expected = value_and_gradient(softmax_focal_loss(plain.requires_grad_(), ids), plain)
    for other in (last.requires_grad_(), wide[:, 10:80, 1:, ::2].requires_grad_()):
        torch.testing.assert_close(value_and_gradient(softmax_focal_loss(other, ids), other), expected)
    rows = plain.detach().movedim(1, -1).reshape(-1, 70).T.contiguous().T.requires_grad_()  # classes far apart
    loss, gradient = value_and_gradient(softmax_focal_loss(rows, ids.flatten()), rows)
    torch.testing.assert_close((loss, gradient.view(4, 6, 5, 70).movedim(-1, 1)), expected)


def test_chunks_with_infinite_logits(on_plain_path: Callable[..., Tensor]) -> None:
    inf = torch.inf
    special = torch.tensor(
        [
            [1.0, -inf, 2.0],  # a masked class
            [-inf, 3.0, 1.0],  # the true class is masked: an infinite loss
            [0.0, -inf, -inf],  # all others are masked: loss 0
            [inf, 0.0, torch.nan],  # ignored
            [-inf, -inf, -inf],  # ignored
        ]
    )
    labels = torch.tensor([0, 0, 0, -100, -100])
    for gamma in (0.0, 0.5, 2.0):
        for rows in ([0], [0, 2, 3, 4], [0, 1, 2, 3, 4]):
            logits, ids = problem((600, 3), torch.float32)
            with torch.no_grad():
                logits[400 : 400 + len(rows)] = special[rows]
            ids[400 : 400 + len(rows)] = labels[rows]
            losses = [
                each(lambda: softmax_focal_loss(logits, ids, gamma=gamma, reduction="sum"))  # noqa: B023
                for each in (lambda function: function(), on_plain_path)
            ]
            given, expected = (value_and_gradient(loss, logits) for loss in losses)
            assert given[0].isinf() == (1 in rows) and given[1].isfinite().all()
            assert not given[1][ids == -100].any()
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)


@all_shapes
def test_any_number_of_derivatives(shape: tuple[int, ...]) -> None:
    logits, ids = problem(shape)
    for reduction in ("none", "mean"):
        loss = softmax_focal_loss(logits, ids, reduction=reduction).sum()
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (third,) = torch.autograd.grad(loss, logits, create_graph=True)
        torch.testing.assert_close((second, third), (first, first))
        assert third.requires_grad and torch.autograd.grad(third.square().sum(), logits)[0].any()


def test_second_derivatives() -> None:
    logits, ids = problem((4, 3))
    weight = torch.linspace(0.5, 2, 3, dtype=torch.float64)
    for reduction in ("none", "mean"):

        def loss(x: Tensor, reduction: Reduction = reduction) -> Tensor:  # type: ignore[assignment]
            return softmax_focal_loss(x, ids, class_weight=weight, reduction=reduction)

        assert torch.autograd.gradcheck(loss, logits, nondet_tol=1e-14)  # one pass, then plain autograd
        assert torch.autograd.gradgradcheck(loss, logits, nondet_tol=1e-14)


def test_a_freed_graph_is_torchs_error() -> None:
    logits, ids = problem((4, 3))
    loss = softmax_focal_loss(logits, ids)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_forward_mode_and_a_gradient_of_the_class_weight_take_plain_autograd() -> None:
    logits, ids = problem((4, 3))
    (gradient,) = torch.autograd.grad(softmax_focal_loss(logits, ids), logits)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits.detach(), torch.ones_like(logits) * torch.arange(3))
        tangent = forward_ad.unpack_dual(softmax_focal_loss(dual, ids)).tangent
    torch.testing.assert_close(tangent, (gradient * torch.arange(3)).sum())
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    softmax_focal_loss(logits, ids, class_weight=weight, reduction="sum").backward()
    assert weight.grad is not None and weight.grad.any()


def test_no_gradient_is_computed_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = problem((40, 70))
    monkeypatch.setattr("retina.losses.one_pass._OnePass.backward", lambda *_: pytest.fail("backward"))
    seen: list[bool] = []
    monkeypatch.setattr(
        "retina.losses.softmax.softmax_loss_and_gradient",
        lambda x, rows, gamma, plain, with_gradient: (seen.append(with_gradient), (torch.zeros(40, 1), None))[1],
    )
    with torch.no_grad():
        softmax_focal_loss(logits, ids)
    softmax_focal_loss(logits.detach(), ids)
    assert seen == [False, False]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 90)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    ids = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for reduction in ("none", "sum", "mean"):
        loss = softmax_focal_loss(logits, ids, reduction=reduction)
        assert not loss.any() and torch.autograd.grad(loss.sum(), logits)[0].shape == shape


def test_float16_gradient_survives_a_loss_scale() -> None:
    """2^-16 of a gradient of 2e-8 is below float16, so the scale of a GradScaler must be applied first."""
    logits = torch.tensor([[2.0, -2.0]], dtype=torch.float16, requires_grad=True)
    scaled = 65536 * softmax_focal_loss(logits, torch.tensor([0])) / 1000
    expected = exact_loss_and_gradient([2.0, -2.0], 0, 2.0)[1][1] * 65.536
    (gradient,) = torch.autograd.grad(scaled, logits)
    assert expected / 65536 < 6e-8 and gradient[0, 1].item() == pytest.approx(expected, rel=1e-3)
