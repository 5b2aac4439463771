"""The one-pass path of the sigmoid focal loss for labels of the logits' shape, compared with the reference."""

from __future__ import annotations

import pytest
import torch
from focal_helpers import close, exact_loss_and_gradient
from test_focal import GAMMAS, LOGITS
from torch import Tensor
from torch.autograd import forward_ad

from retina.losses import sigmoid_focal_loss

KINDS = ["bool", "int", "ignored", "hard", "soft", "mixed"]
all_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retina.losses.focal_labels_cpu.CHUNK_ELEMENTS", 500)


def labels_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    hard = torch.rand(shape, dtype=torch.float64, generator=generator) < 0.3
    if kind == "soft":
        return torch.rand(shape, dtype=torch.float64, generator=generator)
    if kind == "mixed":  # chunks of hard labels, and chunks of both
        labels = hard.double()
        labels.view(-1)[labels.numel() // 2 :: 3] = 0.25
        return labels
    if kind == "ignored":
        return torch.where(torch.rand(shape, generator=generator) < 0.2, -1, hard.long())
    return {"bool": hard, "int": hard.to(torch.uint8), "hard": hard.double()}[kind]


def value_and_gradient(logits: Tensor, labels: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    loss = 3 * sigmoid_focal_loss(x, labels, **options)  # type: ignore[arg-type]
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@all_kinds
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 4.5])
@pytest.mark.parametrize("shape", [(1300,), (130, 7), (3, 4, 900), (1300, 1)], ids=str)
def test_equals_the_reference(kind: str, gamma: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(shape, dtype=torch.float64, generator=generator)
    labels = labels_of(kind, shape)
    rows, elements = torch.rand(shape[:-1], generator=generator), torch.rand(shape, generator=generator)
    alpha = torch.rand(shape[-1], generator=generator)
    for options in (
        {},
        {"alpha": None, "avg_factor": 7.0},
        {"alpha": alpha, "reduction": "sum"},
        {"weight": rows},
        {"weight": elements, "alpha": alpha.tolist()},
        {"weight": elements},
    ):
        given, expected = (
            value_and_gradient(logits, labels, gamma=gamma, impl=impl, **options) for impl in ("chunked", "reference")
        )
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-300)
        assert not given[1][labels == -1].any()


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_lower_precisions(kind: str, dtype: torch.dtype, gamma: float) -> None:
    logits = (4 * torch.randn(700, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = labels_of(kind, (700, 11))
    loss, gradient = value_and_gradient(logits, labels, gamma=gamma)
    expected, expected_gradient = value_and_gradient(logits.double(), labels, gamma=gamma)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    relative = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    cancelled = 1e-8 if kind in ("soft", "mixed") else 1e-12  # the two sides of a soft label have opposite signs
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=relative, atol=1e-7 if dtype == torch.float16 else cancelled
    )


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hard_labels_match_fifty_digits(gamma: float, dtype: torch.dtype) -> None:
    for x in (*LOGITS, -21.0, 21.0):  # where softplus(x) is x in float32, but not in float64
        for positive in (True, False):
            logits = torch.tensor([x], dtype=dtype, requires_grad=True)
            loss = sigmoid_focal_loss(logits, torch.tensor([positive]), gamma=gamma, reduction="sum", impl="chunked")
            (gradient,) = torch.autograd.grad(loss, logits)
            value, slope = exact_loss_and_gradient(logits.item(), positive, gamma)
            relative = 2e-14 if dtype == torch.float64 else 1e-6
            assert close(loss.item(), value, relative, dtype) and close(gradient.item(), slope, relative, dtype), x


@all_kinds
def test_logits_and_labels_in_any_memory_order(kind: str) -> None:
    logits, labels = torch.randn(40, 30, 3), labels_of(kind, (40, 30, 3))
    expected = value_and_gradient(logits, labels)
    turned = value_and_gradient(logits.movedim(0, 2).contiguous().movedim(2, 0), labels.mT.contiguous().mT)
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_infinite_logits(gamma: float) -> None:
    """A masked class counts only where its label asks for it; an ignored element never does, whatever its weight."""
    logits, labels = torch.randn(700, 3), labels_of("ignored", (700, 3))
    logits[labels == 0] = torch.where(torch.rand((labels == 0).sum()) < 0.1, -torch.inf, 0.5)
    logits[labels == -1] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(700)[: (labels == -1).sum()]
    weight = torch.where(labels == -1, torch.nan, 1.0)
    soft = labels_of("mixed", (700, 3)).float().where(labels == 1, (labels == -1).float())
    soft_logits = logits.nan_to_num(0.5, torch.inf, torch.inf).where(labels == -1, logits)
    for x, y, w in ((logits, labels, None), (logits, labels, weight), (soft_logits, soft, None)):
        given, expected = (
            value_and_gradient(x, y, gamma=gamma, weight=w, impl=impl) for impl in ("chunked", "reference")
        )
        assert given[0].isfinite() and given[1].isfinite().all()
        torch.testing.assert_close(given, expected)
    x, y = torch.tensor([-torch.inf, 1.0]), torch.tensor([1.0, 0.0])
    assert sigmoid_focal_loss(x, y, impl="chunked").item() == torch.inf


@all_kinds
def test_any_number_of_derivatives(kind: str) -> None:
    logits, labels = torch.randn(60, 13, dtype=torch.float64, requires_grad=True), labels_of(kind, (60, 13))
    loss = sigmoid_focal_loss(logits, labels, impl="chunked")
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.testing.assert_close((second, third), (first, first))
    (curvature,) = torch.autograd.grad(third.sum(), logits)
    reference = sigmoid_focal_loss(logits, labels, impl="reference")
    (expected,) = torch.autograd.grad(reference, logits, create_graph=True)
    torch.testing.assert_close(curvature, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # the check of the labels' values
def test_what_takes_the_reference() -> None:
    """Labels, weights and alpha with a gradient, and forward mode."""
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    sigmoid_focal_loss(logits, labels, reduction="sum").backward()
    assert labels.grad is not None and labels.grad.all()
    for options in ({}, {"weight": torch.rand(4, 3, requires_grad=True)}, {"reduction": "none"}):
        targets = labels if not options else labels.detach()
        with pytest.raises(ValueError, match=r"impl='chunked' takes class ids, .* or labels of the logits' shape"):
            sigmoid_focal_loss(logits, targets, impl="chunked", **options)  # type: ignore[arg-type]
    hard = labels.detach().round()
    (gradient,) = torch.autograd.grad(sigmoid_focal_loss(logits, hard), logits)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits.detach(), torch.ones_like(logits))
        tangent = forward_ad.unpack_dual(sigmoid_focal_loss(dual, hard)).tangent
    torch.testing.assert_close(tangent, gradient.sum())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 0)], ids=str)
def test_no_elements(shape: tuple[int, ...]) -> None:
    logits, labels = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    for options in ({}, {"weight": torch.zeros(shape[:-1])}, {"alpha": torch.zeros(shape[-1])}):
        loss = sigmoid_focal_loss(logits, labels, impl="chunked", **options)  # type: ignore[arg-type]
        assert loss.item() == 0 and torch.autograd.grad(loss, logits)[0].shape == shape


def test_float16_gradient_survives_a_loss_scale() -> None:
    """2^-16 of a gradient of 1e-6 is below float16, so the scale of a GradScaler must be applied first."""
    logits = torch.tensor([-4.0], dtype=torch.float16, requires_grad=True)
    for label in (False, 0.0):
        loss = sigmoid_focal_loss(logits, torch.tensor([label]), avg_factor=1000.0, impl="chunked")
        (gradient,) = torch.autograd.grad(loss * 65536, logits)
        expected = exact_loss_and_gradient(-4.0, False, 2.0)[1] * 65.536
        assert expected / 65536 < 6e-8 and gradient.item() == pytest.approx(expected, rel=1e-3)
