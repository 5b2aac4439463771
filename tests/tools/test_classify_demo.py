"""The demonstration for classifiers: fair to the four losses, right in its measures, careful in its words."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
from retina_tools import classify_demo as demo
from sklearn.metrics import f1_score, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight

TOOL = Path(__file__).parents[2] / "tools/classify_demo.py"


@pytest.fixture(scope="module")
def problems() -> list[demo.Problem]:
    return demo.make_problems()


@pytest.fixture(scope="module")
def results(problems: list[demo.Problem]) -> list[demo.Result]:
    return [demo.run(problem, seeds=2, steps=15) for problem in problems]


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("which", [0, 2])
def test_losses_share_initial_weights_and_batches(problems: list[demo.Problem], which: int) -> None:
    """Without weights a focal loss with gamma 0 is cross entropy: equal only if all else of a run is equal."""
    problem = problems[which]
    rows, _ = demo.split(problem, 0)
    seen: dict[str, list[torch.Tensor]] = {}
    losses = demo.losses_for(problem, torch.ones(problem.classes))
    for name, loss in losses.items():

        def watched(output: torch.Tensor, y: torch.Tensor, name: str = name, loss: object = loss) -> torch.Tensor:
            seen.setdefault(name, []).append(y)
            return loss(output, y)  # type: ignore[operator]

        demo.train(problem, rows, watched, seed=3, steps=40)  # 40 batches are more than one pass
    assert list(seen) == list(demo.COLORS)
    for batches in seen.values():
        assert torch.equal(torch.stack(batches), torch.stack(seen["CE"]))

    starts = [parameters(demo.train(problem, rows, loss, 3, steps=0)) for loss in losses.values()]
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert not torch.equal(parameters(demo.train(problem, rows, losses["CE"], 4, steps=0)), starts[0])

    plain = parameters(demo.train(problem, rows, losses["CE"], 3, steps=5))
    focal = losses["focal"]
    flat = parameters(demo.train(problem, rows, lambda x, y: focal(x, y, gamma=0.0), 3, steps=5))  # type: ignore[call-arg]
    torch.testing.assert_close(flat, plain, rtol=1e-3, atol=1e-4)
    assert (parameters(demo.train(problem, rows, focal, 3, steps=5)) - plain).abs().max() > 1e-3


def test_problems_are_as_described(problems: list[demo.Problem]) -> None:
    for problem, shares in zip(problems, [(80, 20), (90, 9, 1), (85, 10, 4, 1)], strict=True):
        rows, test = demo.split(problem, 0)
        assert not set(rows.tolist()) & set(test.tolist())
        assert set(rows.tolist()) != set(demo.split(problem, 1)[0].tolist())
        for part in (rows, test):
            found = torch.bincount(problem.labels[part]) / len(part) * 100
            torch.testing.assert_close(found, torch.tensor(shares).float(), rtol=0, atol=0.6)
        assert (problem.labels[test] == problem.classes - 1).sum() >= 100
        weights = demo.class_weights(problem.labels[rows], problem.classes)
        y = problem.labels[rows].numpy()
        np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.unique(y), y=y), rtol=1e-6)


@pytest.mark.parametrize("which", [1, 2])
def test_the_four_losses_by_their_formula(problems: list[demo.Problem], which: int) -> None:
    problem = problems[which]
    rng = np.random.default_rng(which)
    log_p = torch.from_numpy(rng.standard_normal((50, problem.classes))).log_softmax(1)
    y = torch.from_numpy(rng.integers(problem.classes, size=50))
    w = torch.arange(1.0, problem.classes + 1).double()
    at_truth = log_p.gather(1, y[:, None])[:, 0]
    focal = (1 - at_truth.exp()) ** 2
    for name, loss in demo.losses_for(problem, w).items():
        weight = w[y] if "weighted" in name else torch.ones_like(at_truth)
        factor = focal if "focal" in name else torch.ones_like(at_truth)
        torch.testing.assert_close(loss(log_p, y), -(weight * factor * at_truth).sum() / weight.sum())


def test_two_calls_give_identical_numbers(problems: list[demo.Problem], results: list[demo.Result]) -> None:
    again = demo.run(problems[2], seeds=2, steps=15)
    for name, values in results[2].scores.items():
        for key, value in values.items():
            assert (value == again.scores[name][key]).all(), (name, key)
    assert not np.array_equal(*np.split(again.probabilities["CE"], 2)), "seeds differ"


def test_training_beats_guessing(problems: list[demo.Problem]) -> None:
    scores = demo.run(problems[0], seeds=1, steps=200).scores
    assert all(values["macro F1"][0] > 0.8 for values in scores.values())


def test_measures_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet([4, 2, 0.5], size=500)
    y = rng.choice(3, size=500, p=[0.6, 0.3, 0.1])
    for probabilities in (p, p * [1, 1, 0]):  # the second never predicts class 2
        guess = probabilities.argmax(1)
        precision, recall, _, _ = precision_recall_fscore_support(y, guess, zero_division=0)
        scores = demo.measure(probabilities, y)
        for c, name in enumerate(["class 0", "class 1", demo.RARE]):
            assert scores[f"precision of {name}"] == pytest.approx(precision[c])
            assert scores[f"recall of {name}"] == pytest.approx(recall[c])
        assert scores["macro F1"] == pytest.approx(f1_score(y, guess, average="macro", zero_division=0))


def test_calibration_error_by_hand() -> None:
    """Bins of width 1/15: 0.62 and 0.65 share the tenth, (0.6, 0.667]; 0.95 is in the last, with 1.0."""
    top = np.array([0.62, 0.65, 0.95, 1.0, 0.80])
    p = np.stack([top, 1 - top], axis=1)
    y = np.array([0, 1, 0, 0, 0])  # right, wrong, right, right, right
    count, confidence, accuracy = demo.calibration(p, y)
    assert count.tolist() == [0] * 9 + [2, 0, 1, 0, 0, 2]
    assert confidence[[9, 11, 14]] == pytest.approx([0.635, 0.8, 0.975])
    assert accuracy[[9, 11, 14]] == pytest.approx([0.5, 1, 1])
    scores = demo.measure(p, y)
    assert scores["ECE"] == pytest.approx((2 * 0.135 + 1 * 0.2 + 2 * 0.025) / 5)
    assert scores["confidence - accuracy"] == pytest.approx((2 * 0.135 - 1 * 0.2 - 2 * 0.025) / 5)


def around(mean: float) -> np.ndarray:
    return mean + np.array([-0.1, 0.0, 0.1])  # standard deviation 0.1


def test_difference_is_held_against_the_pooled_deviation() -> None:
    assert demo.difference(around(0.5), around(0.39)) == (pytest.approx(0.11), True)
    assert demo.difference(around(0.39), around(0.5)) == (pytest.approx(-0.11), True)
    assert demo.difference(around(0.5), around(0.41))[1] is False
    wide = 0.5 + 2 * np.array([-0.1, 0.0, 0.1])  # pooled: sqrt((0.01 + 0.04) / 2) = 0.158
    assert demo.difference(wide, around(0.35))[1] is False
    assert demo.difference(wide, around(0.34))[1] is True
    assert demo.difference(np.array([0.9]), np.array([0.1]))[1] is False, "one seed shows no noise"


def test_best_sentence_names_a_winner_only_beyond_the_noise() -> None:
    level = demo.best_sentence("recall", {"CE": around(0.50), "focal": around(0.55)})
    assert level == "recall: no difference beyond the noise between the losses; focal has 0.550 ± 0.100."
    values = {"CE": around(0.5), "focal": around(0.75), "weighted CE": around(0.8)}
    assert demo.best_sentence("recall", values) == (
        "recall: weighted CE is best (0.800 ± 0.100); focal: no difference beyond the noise."
    )
    assert demo.best_sentence("ECE", values, sign=-1) == "ECE: CE is best (0.500 ± 0.100)."


def test_conclusions_follow_the_numbers() -> None:
    even = {name: {key: around(0.5) for key in demo.BETTER} for name in demo.COLORS}
    assert "Better: nothing. Worse: nothing." in demo.pair_sentence("focal", "CE", {"a": even})
    moved = even | {"focal": even["focal"] | {"ECE": around(0.7), "macro F1": around(0.7)}}
    text = demo.pair_sentence("focal", "CE", {"a: one": even, "b: two": moved})
    assert text.startswith("focal against CE. Better: macro F1 (b 0.700 against 0.500). Worse: ECE (b 0.700 against")
    swapped = demo.pair_sentence("CE", "focal", {"a: one": even, "b: two": moved})
    assert "Better: ECE (b 0.500 against 0.700). Worse: macro F1 (b 0.500 against 0.700)." in swapped
    assert any(line.startswith("b, ECE: ") for line in demo.conclusions({"a: one": even, "b: two": moved}))
    single = {name: {key: value[:1] for key, value in values.items()} for name, values in moved.items()}
    assert "One seed" in demo.conclusions({"a: one": single})[0]
    assert not any("is best" in line for line in demo.conclusions({"a: one": single}))


def test_tables_are_aligned_markdown(results: list[demo.Result]) -> None:
    for result in results:
        lines = demo.table(result.scores).splitlines()
        assert len(lines) == 2 + 2 * result.problem.classes + 3
        assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 120
        assert {line.count("|") for line in lines} == {6}
        assert set(lines[1]) == {"|", "-"}


def test_picture(results: list[demo.Result], tmp_path: Path) -> None:
    path = demo.draw(results, tmp_path / "picture.png")
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.size == (1600, 600)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 100


def test_curves_in_the_picture_are_the_formula() -> None:
    axes = demo.Figure().subplots()
    demo._draw_curves(axes)
    for line, gamma in zip(axes.lines, (0, 0.5, 1, 2, 5), strict=True):
        p, loss = map(np.asarray, line.get_data())
        np.testing.assert_allclose(loss, -((1 - p) ** gamma) * np.log(p), atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "0"], "--seeds"), (["--steps", "-1"], "--steps"), (["--output", str(TOOL)], "--output")],
)
def test_usage_errors(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["classify_demo.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["classify_demo.py", "--output", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_command_prints_tables_and_writes_one_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["classify_demo.py", "--output", str(tmp_path / "new"), "--seeds=1", "--steps=5"])
    assert demo.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("| recall of the rarest class") == 3
    assert "What the numbers say" in printed
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= 120
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["classify_demo.png"]
