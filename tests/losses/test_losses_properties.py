"""Properties that hold for every input, tested by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from retina.losses import sigmoid_focal_loss, softmax_focal_loss

settings.register_profile("retina", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("retina")
GAMMA = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0]), st.floats(0, 6))
IMPL = st.sampled_from(["reference", "chunked"])


@st.composite
def problem(draw: st.DrawFn, background: bool = True) -> tuple[Tensor, Tensor]:
    """(N, K) float64 logits and class ids, some of them ignored; N may be 0, K may be 1."""
    rows, classes = draw(st.integers(0, 12)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0, 3000.0]))
    logits = scale * torch.randn(rows, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(-1, classes + background, (rows,), generator=generator)


def gradient_of(logits: Tensor, ids: Tensor, **options: object) -> Tensor:
    x = logits.clone().requires_grad_()
    return torch.autograd.grad(sigmoid_focal_loss(x, ids, reduction="sum", **options), x)[0]  # type: ignore[arg-type]


@given(problem(), IMPL)
def test_gamma_zero_is_binary_cross_entropy(case: tuple[Tensor, Tensor], impl: str) -> None:
    logits, ids = case
    y = F.one_hot(ids.clamp(min=0), logits.shape[1] + 1)[:, :-1].double()
    expected = (F.binary_cross_entropy_with_logits(logits, y, reduction="none") * (ids >= 0)[:, None]).sum()
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, ids, alpha=None, gamma=0, reduction="sum", impl=impl), expected
    )


@given(problem(background=False))
def test_gamma_zero_is_cross_entropy(case: tuple[Tensor, Tensor]) -> None:
    logits, ids = case
    loss = softmax_focal_loss(logits, ids, gamma=0, ignore_index=-1, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids, ignore_index=-1, reduction="none"))


@given(problem(), GAMMA, IMPL, st.randoms(use_true_random=False))
def test_order_of_rows_and_classes_does_not_matter(
    case: tuple[Tensor, Tensor], gamma: float, impl: str, random
) -> None:  # type: ignore[no-untyped-def]
    logits, ids = case
    rows, classes = list(range(len(ids))), list(range(logits.shape[1]))
    random.shuffle(rows)
    random.shuffle(classes)
    place = torch.tensor([*[classes.index(c) for c in range(len(classes))], len(classes), -1])  # background, ignored
    shuffled = gradient_of(logits[rows][:, classes], place[ids[rows]], gamma=gamma, impl=impl)
    torch.testing.assert_close(shuffled, gradient_of(logits, ids, gamma=gamma, impl=impl)[rows][:, classes])


@given(problem(), GAMMA, IMPL, st.integers(0, 12))
def test_loss_is_additive_over_rows(case: tuple[Tensor, Tensor], gamma: float, impl: str, cut: int) -> None:
    logits, ids = case
    parts = [
        sigmoid_focal_loss(logits[part], ids[part], gamma=gamma, reduction="sum", impl=impl)
        for part in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(sum(parts), sigmoid_focal_loss(logits, ids, gamma=gamma, reduction="sum", impl=impl))


@given(problem(), GAMMA, IMPL)
def test_ignored_rows_have_gradient_zero_and_change_nothing(
    case: tuple[Tensor, Tensor], gamma: float, impl: str
) -> None:
    logits, ids = case
    gradient = gradient_of(logits, ids, gamma=gamma, impl=impl)
    assert not gradient[ids == -1].any()
    torch.testing.assert_close(gradient[ids >= 0], gradient_of(logits[ids >= 0], ids[ids >= 0], gamma=gamma, impl=impl))
    everything = gradient_of(logits, torch.full_like(ids, -1), gamma=gamma, impl=impl)
    assert everything.shape == logits.shape and not everything.any()


@given(problem(), GAMMA)
def test_chunked_equals_reference(case: tuple[Tensor, Tensor], gamma: float) -> None:
    logits, ids = case
    chunked, reference = (gradient_of(logits, ids, gamma=gamma, impl=impl) for impl in ("chunked", "reference"))
    torch.testing.assert_close(chunked, reference, rtol=1e-9, atol=1e-300)


@given(problem(), GAMMA, IMPL, st.floats(0, 1))
def test_alpha_weights_positives_and_one_minus_alpha_negatives(
    case: tuple[Tensor, Tensor], gamma: float, impl: str, alpha: float
) -> None:
    logits, ids = case
    positive = F.one_hot(ids.clamp(min=0), logits.shape[1] + 1)[:, :-1].bool() & (ids >= 0)[:, None]
    plain = gradient_of(logits, ids, alpha=None, gamma=gamma, impl=impl)
    expected = torch.where(positive, alpha * plain, (1 - alpha) * plain)
    torch.testing.assert_close(gradient_of(logits, ids, alpha=alpha, gamma=gamma, impl=impl), expected)
    same = torch.full((logits.shape[1],), alpha, dtype=torch.float64)
    torch.testing.assert_close(gradient_of(logits, ids, alpha=same, gamma=gamma, impl=impl), expected)


@given(problem(), GAMMA)
def test_one_hot_equals_class_ids(case: tuple[Tensor, Tensor], gamma: float) -> None:
    logits, ids = case
    kept = ids >= 0
    one_hot = F.one_hot(ids[kept], logits.shape[1] + 1)[:, :-1]
    by_ids = gradient_of(logits[kept], ids[kept], gamma=gamma)
    for labels in (one_hot, one_hot.bool(), one_hot.float()):
        torch.testing.assert_close(gradient_of(logits[kept], labels, gamma=gamma), by_ids)


@given(problem(), GAMMA, GAMMA)
def test_loss_does_not_grow_with_gamma(case: tuple[Tensor, Tensor], gamma: float, other: float) -> None:
    logits, ids = case
    low, high = sorted((gamma, other))
    losses = [sigmoid_focal_loss(logits, ids, gamma=g, reduction="none") for g in (high, low)]
    assert (losses[0] <= losses[1] * (1 + 1e-12)).all() and (losses[0] >= 0).all()


@settings(max_examples=200)
@given(
    st.floats(-1e4, 1e4, width=32),
    GAMMA,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    IMPL,
)
def test_never_nan(x: float, gamma: float, dtype: torch.dtype, positive: bool, impl: str) -> None:
    logits = torch.tensor([[x]], dtype=dtype, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1 - int(positive)]), gamma=gamma, reduction="sum", impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all() and loss >= 0
    assert (gradient <= 0) if positive else (gradient >= 0)
