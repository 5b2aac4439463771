from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from retina.losses import class_counts, class_weights, prior_bias

LABELS = torch.tensor([0] * 90 + [1] * 9 + [2])


def test_counts_equal_numpy() -> None:
    for labels in (
        LABELS,
        LABELS.view(10, 10).to(torch.uint8),
        LABELS.to(torch.uint16),
        LABELS.tolist(),
        LABELS.numpy(),
    ):
        counts = class_counts(labels, 4)
        assert counts.dtype == torch.int64
        assert counts.tolist() == np.bincount(LABELS, minlength=4).tolist() == [90, 9, 1, 0]
    assert class_counts([0, 0, 2], 3).tolist() == [2, 0, 1]
    assert class_counts([0, 0, 2], np.int64(3)).tolist() == [2, 0, 1]  # type: ignore[arg-type]


def test_counts_of_parts_can_be_added() -> None:
    for empty in ([], torch.zeros(0, 5, dtype=torch.int64), LABELS[:0]):
        assert class_counts(empty, 3).tolist() == [0, 0, 0]
    torch.testing.assert_close(class_counts(LABELS[:95], 3) + class_counts(LABELS[95:], 3), class_counts(LABELS, 3))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, -100, 5, -100],
            r"labels: 3 of 4 are not in 0\.\.2: -100 \(2 x\), 5 \(1 x\); drop .* labels\[labels != -100\]",
        ),
        ([0, 1, 3], r"labels: 1 of 3 are not in 0\.\.2: 3 \(1 x\)"),
        (list(range(10)), r"7 of 10 .*: 3 \(1 x\), .* 7 \(1 x\), \.\.\. \(7 in all\)"),
        (torch.tensor([255], dtype=torch.uint8), r"255 \(1 x\)"),
        ([0.0, 1.0], r"labels: given torch\.float32, expected integers: labels\.long\(\)"),
        (torch.zeros(0), r"labels: given torch\.float32"),
        ([True, False], r"labels: given torch\.bool, expected integers: .* one-hot"),
        (["cat"], "labels: given list, expected a tensor, an array or a sequence of integers"),
    ],
)
def test_invalid_labels(labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_counts(labels, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes: given 0"):
        class_counts([0], 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.uint16])
def test_one_hot_integers_are_not_counted_as_class_ids(dtype: torch.dtype) -> None:
    one_hot = F.one_hot(LABELS, 4).to(dtype)
    for labels in (one_hot, one_hot.numpy(), one_hot.tolist()):
        with pytest.raises(ValueError, match=r"shape \(100, 4\), one-hot in dimension 1; .*: labels\.argmax\(1\)"):
            class_counts(labels, 4)
    masks = F.one_hot(LABELS.view(4, 5, 5), 4).to(dtype)
    for labels, dim in ((masks, 3), (masks.movedim(3, 1), 1)):
        with pytest.raises(ValueError, match=rf"labels\.argmax\({dim}\)"):
            class_counts(labels, 4)
    for labels in (LABELS.view(25, 4), torch.tensor([[0, 1], [1, 1]]), torch.zeros(3, 1, dtype=torch.long)):
        counts = class_counts(labels, labels.shape[1])  # class ids that happen to have K columns
        assert counts.tolist() == np.bincount(labels.flatten(), minlength=labels.shape[1]).tolist()


def test_balanced_equals_scikit_learn() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy()).tolist()
    for counts in (class_counts(LABELS, 3), [90, 9, 1], [90.0, 9.0, 1.0], (90, 9, 1), np.array([90, 9, 1], np.uint16)):
        weights = class_weights(counts)  # type: ignore[arg-type]
        assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx(expected)
    present = compute_class_weight("balanced", classes=np.array([0, 2]), y=[0, 0, 0, 2])
    weights = class_weights(class_counts([0, 0, 0, 2], 3), zero="ignore")
    assert weights.tolist() == pytest.approx([present[0], 0, present[1]])


def test_small_integers_are_counts() -> None:
    """An earlier version refused [0, 0, 2]: three labels or three counts."""
    assert class_weights([0, 0, 2], zero="ignore").tolist() == [0, 0, 1]
    assert class_weights([2, 1, 1], "inverse").tolist() == [0.5, 1, 1]


def test_schemes_by_hand() -> None:
    counts = torch.tensor([100.0, 25.0, 1.0])
    assert class_weights(counts, scheme="inverse").tolist() == pytest.approx([0.01, 0.04, 1])
    assert class_weights(counts, scheme="inverse_sqrt").tolist() == pytest.approx([0.1, 0.2, 1])
    effective = class_weights(counts, scheme="effective_number", beta=0.9).tolist()
    assert effective == pytest.approx([0.1 / (1 - 0.9**100), 0.1 / (1 - 0.9**25), 1])
    assert class_weights(counts, scheme="effective_number", beta=0).tolist() == [1, 1, 1]
    with mpmath.workdps(50):
        beta = 1 - 1e-14
        exact = (1 - mpmath.mpf(beta)) / (1 - mpmath.mpf(beta) ** 100)
    given = class_weights(counts, scheme="effective_number", beta=beta)[0].item()
    assert given == pytest.approx(float(exact), rel=3e-7)
    smooth = class_weights([3.0, 0.0], scheme="inverse", zero="smooth").tolist()
    assert smooth == pytest.approx([1 / 4, 1])


def test_float_counts_of_a_sequence_are_read_in_float64() -> None:
    counts = np.random.default_rng(0).uniform(1, 1e6, 1000)
    expected = (counts.sum() / (1000 * counts)).astype(np.float32)
    assert class_weights(counts.tolist()).tolist() == expected.tolist()


def test_normalized_weights_average_one() -> None:
    counts = torch.tensor([90.0, 10.0, 0.0])
    classes = class_weights(counts, scheme="inverse", zero="ignore", normalize="classes")
    assert classes.sum().item() == pytest.approx(2) and classes[2] == 0  # two classes have examples
    examples = class_weights(counts, scheme="inverse_sqrt", zero="ignore", normalize="examples")
    assert (examples * counts).sum().item() == pytest.approx(100)


FOR_LABELS = r".*for labels: class_weights\(class_counts\(labels, num_classes\)\)"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[3, 1], [2, 2]], r"counts: given torch\.int64 of shape \(2, 2\), expected .* of shape \(K,\)" + FOR_LABELS),
        (3, r"counts: given torch\.int64 of shape \(\)" + FOR_LABELS),
        ([True, False], r"counts: given torch\.bool of shape \(2,\)" + FOR_LABELS),
        ([1j, 2], r"counts: given torch\.complex64"),
        ([4, -100, 1], "counts: given -100 for class 1, expected finite numbers of at least 0" + FOR_LABELS),
        ([math.nan, 1.0, math.inf], "counts: given nan for class 0, inf for class 2"),
        ([0.0, 0.0], "counts: all are 0"),
        ([], "counts: empty"),
        ({"cat": 3}, "counts: given dict, expected a tensor, an array or a sequence of numbers"),
        ([2, 0, 1], "counts: no examples of class 1: pass zero='ignore' or zero='smooth'" + FOR_LABELS),
        (LABELS, r"no examples of class 0, 1, 2, 3, 4, \.\.\. \(90 in all\)" + FOR_LABELS),
    ],
)
def test_invalid_counts(counts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_weights(counts, zero="ignore" if "all are" in message else "error")  # type: ignore[arg-type]


def test_an_old_call_says_what_to_change() -> None:
    with pytest.raises(ValueError, match="scheme: given 3, expected one of balanced, .* no longer" + FOR_LABELS):
        class_weights(LABELS, 3)  # type: ignore[arg-type]


def test_smoothed_counts_are_normalized_over_the_original_ones() -> None:
    counts = torch.tensor([90.0, 10.0, 0.0])
    weights = class_weights(counts, zero="smooth", normalize="examples")
    assert (weights * counts).sum().item() == pytest.approx(100)
    weights = class_weights(counts, zero="smooth", normalize="classes")
    assert weights[:2].sum().item() == pytest.approx(2)


def test_invalid_choices_of_class_weights() -> None:
    for wrong, name in (({"scheme": "log"}, "scheme"), ({"zero": "skip"}, "zero"), ({"normalize": "sum"}, "normalize")):
        with pytest.raises(ValueError, match=f"{name}: given"):
            class_weights([3.0, 1.0], **wrong)
    with pytest.raises(ValueError, match=r"beta: given 1\.0"):
        class_weights([3.0, 1.0], beta=1.0)


def test_sigmoid_of_prior_bias_is_pi() -> None:
    assert prior_bias(0.01) == pytest.approx(-4.59512, rel=1e-5)  # -log(99), the paper's
    frequencies = torch.tensor([0.9, 0.09, 0.01])
    torch.testing.assert_close(prior_bias(frequencies).sigmoid(), frequencies)
    for wrong in (0.0, 1.0, torch.tensor([0.5, 1.0]), math.nan):
        with pytest.raises(ValueError, match="pi: given"):
            prior_bias(wrong)
