from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from retina.losses import class_weights, prior_bias

LABELS = torch.tensor([0] * 90 + [1] * 9 + [2])


def test_balanced_equals_scikit_learn() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy())
    assert class_weights(LABELS, 3).tolist() == pytest.approx(expected.tolist())
    assert class_weights(LABELS.view(10, 10).to(torch.uint8), 3).tolist() == pytest.approx(expected.tolist())
    assert class_weights([90, 9, 1], 3).tolist() == pytest.approx(expected.tolist())
    present = compute_class_weight("balanced", classes=np.array([0, 2]), y=[0, 0, 0, 2])
    assert class_weights([0, 0, 0, 2], 3, zero="ignore").tolist() == pytest.approx([present[0], 0, present[1]])


def test_schemes_by_hand() -> None:
    counts = torch.tensor([100.0, 25.0, 1.0])
    assert class_weights(counts, 3, scheme="inverse").tolist() == pytest.approx([0.01, 0.04, 1])
    assert class_weights(counts, 3, scheme="inverse_sqrt").tolist() == pytest.approx([0.1, 0.2, 1])
    effective = class_weights(counts, 3, scheme="effective_number", beta=0.9).tolist()
    assert effective == pytest.approx([0.1 / (1 - 0.9**100), 0.1 / (1 - 0.9**25), 1])
    assert class_weights(counts, 3, scheme="effective_number", beta=0).tolist() == [1, 1, 1]
    with mpmath.workdps(50):
        beta = 1 - 1e-14
        exact = (1 - mpmath.mpf(beta)) / (1 - mpmath.mpf(beta) ** 100)
    given = class_weights(counts, 3, scheme="effective_number", beta=beta)[0].item()
    assert given == pytest.approx(float(exact), rel=3e-7)
    smooth = class_weights([3.0, 0.0], 2, scheme="inverse", zero="smooth").tolist()
    assert smooth == pytest.approx([1 / 4, 1])


def test_normalized_weights_average_one() -> None:
    counts = torch.tensor([90.0, 10.0, 0.0])
    classes = class_weights(counts, 3, scheme="inverse", zero="ignore", normalize="classes")
    assert classes.sum().item() == pytest.approx(2) and classes[2] == 0  # two classes have examples
    examples = class_weights(counts, 3, scheme="inverse_sqrt", zero="ignore", normalize="examples")
    assert (examples * counts).sum().item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("given", "classes", "message"),
    [
        ([0, 1, 5], 4, r"labels: given 0\.\.5, expected 0\.\.3"),
        ([0, -1, 1, 1], 2, r"labels: given -1\.\.1"),
        ([0, 1, 1], 3, "3 labels or 3 counts: pass counts as floats"),
        ([1.0, 2.0], 3, r"counts \(floats\): given shape \(2,\), expected 3 finite"),
        ([1.0, math.nan], 2, r"counts \(floats\): given shape"),
        ([0.0, 0.0], 2, "all are 0"),
        ([], 2, "empty"),
        ([3, 1], 0, "num_classes: given 0"),
        ([0, 0, 0, 2], 3, "no examples of class 1"),
    ],
)
def test_invalid_counts(given: list[float], classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_weights(given, classes, zero="ignore" if "all" in message else "error")


def test_smoothed_counts_are_normalized_over_the_original_ones() -> None:
    counts = torch.tensor([90.0, 10.0, 0.0])
    weights = class_weights(counts, 3, zero="smooth", normalize="examples")
    assert (weights * counts).sum().item() == pytest.approx(100)
    weights = class_weights(counts, 3, zero="smooth", normalize="classes")
    assert weights[:2].sum().item() == pytest.approx(2)
    assert class_weights(LABELS.to(torch.uint16), np.int64(3)).shape == (3,)


def test_invalid_choices_of_class_weights() -> None:
    for wrong, name in (({"scheme": "log"}, "scheme"), ({"zero": "skip"}, "zero"), ({"normalize": "sum"}, "normalize")):
        with pytest.raises(ValueError, match=f"{name}: given"):
            class_weights([3.0, 1.0], 2, **wrong)
    with pytest.raises(ValueError, match=r"beta: given 1\.0"):
        class_weights([3.0, 1.0], 2, beta=1.0)


def test_sigmoid_of_prior_bias_is_pi() -> None:
    assert prior_bias(0.01) == pytest.approx(-4.59512, rel=1e-5)  # -log(99), the paper's
    frequencies = torch.tensor([0.9, 0.09, 0.01])
    torch.testing.assert_close(prior_bias(frequencies).sigmoid(), frequencies)
    for wrong in (0.0, 1.0, torch.tensor([0.5, 1.0]), math.nan):
        with pytest.raises(ValueError, match="pi: given"):
            prior_bias(wrong)
