"""The classification demonstration: equal conditions for the four losses, correct metrics, conclusions from numbers."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("sklearn")
from matplotlib.figure import Figure
from retina_tools import classify_demo as command
from sklearn.metrics import f1_score, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight

from retina.classify_demo import experiment, figure, problems, summary
from retina.classify_demo.experiment import LOSSES, RAREST, Loss, Result
from retina.classify_demo.problems import Problem
from retina.losses import class_counts, class_weights

TOOL = Path(__file__).parents[2] / "tools/classify_demo.py"


@pytest.fixture(scope="module", name="all_problems")
def make_all_problems() -> list[Problem]:
    return problems.make_problems()


@pytest.fixture(scope="module")
def results(all_problems: list[Problem]) -> list[Result]:
    return [experiment.run_experiment(problem, seeds=2, steps=15) for problem in all_problems]


def parameters(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("which", [0, 2])
def test_losses_share_initial_weights_and_batches(all_problems: list[Problem], which: int) -> None:
    """Without weights a focal loss with gamma 0 is cross entropy: equal only if all else of a run is equal."""
    problem = all_problems[which]
    indices, _ = problems.split(problem, 0)
    batches_of: dict[str, list[Tensor]] = {}
    losses = experiment.build_losses(problem, torch.ones(problem.num_classes))
    for name, loss in losses.items():

        def recording_loss(output: Tensor, y: Tensor, name: str = name, loss: Loss = loss) -> Tensor:
            batches_of.setdefault(name, []).append(y)
            return loss(output, y)

        experiment.train(problem, indices, recording_loss, seed=3, steps=40)  # 40 batches are more than one pass
    assert list(batches_of) == list(LOSSES)
    for batches in batches_of.values():
        assert torch.equal(torch.stack(batches), torch.stack(batches_of["CE"]))

    starts = [parameters(experiment.train(problem, indices, loss, 3, steps=0)) for loss in losses.values()]
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert not torch.equal(parameters(experiment.train(problem, indices, losses["CE"], 4, steps=0)), starts[0])

    after_ce = parameters(experiment.train(problem, indices, losses["CE"], 3, steps=5))
    focal = losses["focal"]
    after_gamma_0 = parameters(experiment.train(problem, indices, lambda x, y: focal(x, y, gamma=0.0), 3, steps=5))  # type: ignore[call-arg]
    torch.testing.assert_close(after_gamma_0, after_ce, rtol=1e-3, atol=1e-4)
    assert (parameters(experiment.train(problem, indices, focal, 3, steps=5)) - after_ce).abs().max() > 1e-3


def test_problems_are_as_described(all_problems: list[Problem]) -> None:
    for problem, expected in zip(all_problems, [(80, 20), (90, 9, 1), (85, 10, 4, 1)], strict=True):
        train_indices, test_indices = problems.split(problem, 0)
        assert not set(train_indices.tolist()) & set(test_indices.tolist())
        assert set(train_indices.tolist()) != set(problems.split(problem, 1)[0].tolist())
        for indices in (train_indices, test_indices):
            percent = torch.bincount(problem.labels[indices]) / len(indices) * 100
            torch.testing.assert_close(percent, torch.tensor(expected).float(), rtol=0, atol=0.6)
        assert (problem.labels[test_indices] == problem.num_classes - 1).sum() >= 100
        weights = class_weights(class_counts(problem.labels[train_indices], problem.num_classes))
        y = problem.labels[train_indices].numpy()
        np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.unique(y), y=y), rtol=1e-6)


@pytest.mark.parametrize("which", [1, 2])
def test_the_four_losses_by_their_formula(all_problems: list[Problem], which: int) -> None:
    problem = all_problems[which]
    rng = np.random.default_rng(which)
    log_p = torch.from_numpy(rng.standard_normal((50, problem.num_classes))).log_softmax(1)
    y = torch.from_numpy(rng.integers(problem.num_classes, size=50))
    w = torch.arange(1.0, problem.num_classes + 1).double()
    log_p_t = log_p.gather(1, y[:, None])[:, 0]
    focal = (1 - log_p_t.exp()) ** 2
    for name, loss in experiment.build_losses(problem, w).items():
        weight = w[y] if "weighted" in name else torch.ones_like(log_p_t)
        factor = focal if "focal" in name else torch.ones_like(log_p_t)
        torch.testing.assert_close(loss(log_p, y), -(weight * factor * log_p_t).sum() / weight.sum())


def test_two_calls_give_identical_numbers(all_problems: list[Problem], results: list[Result]) -> None:
    again = experiment.run_experiment(all_problems[2], seeds=2, steps=15)
    for name, values in results[2].scores.items():
        for key, value in values.items():
            assert (value == again.scores[name][key]).all(), (name, key)
    assert not np.array_equal(*np.split(again.probabilities["CE"], 2)), "seeds differ"


def test_training_reaches_a_macro_f1_of_80_percent(all_problems: list[Problem]) -> None:
    scores = experiment.run_experiment(all_problems[0], seeds=1, steps=200).scores
    assert all(values["macro F1"][0] > 0.8 for values in scores.values())


def test_metrics_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet([4, 2, 0.5], size=500)
    y = rng.choice(3, size=500, p=[0.6, 0.3, 0.1])
    for probabilities in (p, p * [1, 1, 0]):  # the second never predicts class 2
        predictions = probabilities.argmax(1)
        precision, recall, _, _ = precision_recall_fscore_support(y, predictions, zero_division=0)
        scores = experiment.compute_metrics(probabilities, y)
        for c, name in enumerate(["class 0", "class 1", RAREST]):
            assert scores[f"precision of {name}"] == pytest.approx(precision[c])
            assert scores[f"recall of {name}"] == pytest.approx(recall[c])
        assert scores["macro F1"] == pytest.approx(f1_score(y, predictions, average="macro", zero_division=0))


def test_calibration_error_by_hand() -> None:
    """Bins of width 1/15: 0.62 and 0.65 share the tenth, (0.6, 0.667]; 0.95 is in the last, with 1.0."""
    top = np.array([0.62, 0.65, 0.95, 1.0, 0.80])
    p = np.stack([top, 1 - top], axis=1)
    y = np.array([0, 1, 0, 0, 0])  # right, wrong, right, right, right
    count, confidence, accuracy = experiment.calibration_bins(p, y)
    assert count.tolist() == [0] * 9 + [2, 0, 1, 0, 0, 2]
    assert confidence[[9, 11, 14]] == pytest.approx([0.635, 0.8, 0.975])
    assert accuracy[[9, 11, 14]] == pytest.approx([0.5, 1, 1])
    scores = experiment.compute_metrics(p, y)
    assert scores["ECE"] == pytest.approx((2 * 0.135 + 1 * 0.2 + 2 * 0.025) / 5)
    assert scores["confidence - accuracy"] == pytest.approx((2 * 0.135 - 1 * 0.2 - 2 * 0.025) / 5)


def three_seeds(mean: float) -> np.ndarray:
    return mean + np.array([-0.1, 0.0, 0.1])  # standard deviation 0.1


def test_difference_is_compared_with_the_pooled_deviation() -> None:
    assert summary.difference(three_seeds(0.5), three_seeds(0.39)) == (pytest.approx(0.11), True)
    assert summary.difference(three_seeds(0.39), three_seeds(0.5)) == (pytest.approx(-0.11), True)
    assert summary.difference(three_seeds(0.5), three_seeds(0.41))[1] is False
    wide = 0.5 + 2 * np.array([-0.1, 0.0, 0.1])  # pooled: sqrt((0.01 + 0.04) / 2) = 0.158
    assert summary.difference(wide, three_seeds(0.35))[1] is False
    assert summary.difference(wide, three_seeds(0.34))[1] is True
    assert summary.difference(np.array([0.9]), np.array([0.1]))[1] is False, "one seed shows no noise"


def test_best_sentence_names_a_winner_only_beyond_the_noise() -> None:
    tie = summary.best_sentence("recall", {"CE": three_seeds(0.50), "focal": three_seeds(0.55)})
    assert tie == "recall: no difference beyond the noise between the losses; focal has 0.550 ± 0.100."
    values = {"CE": three_seeds(0.5), "focal": three_seeds(0.75), "weighted CE": three_seeds(0.8)}
    assert summary.best_sentence("recall", values) == (
        "recall: weighted CE is best (0.800 ± 0.100); focal: no difference beyond the noise."
    )
    assert summary.best_sentence("ECE", values, sign=-1) == "ECE: CE is best (0.500 ± 0.100)."


def test_conclusions_follow_the_numbers() -> None:
    equal = {name: {key: three_seeds(0.5) for key in summary.SIGNS} for name in LOSSES}
    assert "Better: nothing. Worse: nothing." in summary.pair_sentence("focal", "CE", {"a": equal})
    changed = equal | {"focal": equal["focal"] | {"ECE": three_seeds(0.7), "macro F1": three_seeds(0.7)}}
    sentence = summary.pair_sentence("focal", "CE", {"a: one": equal, "b: two": changed})
    assert sentence.startswith(
        "focal against CE. Better: macro F1 (b 0.700 against 0.500). Worse: ECE (b 0.700 against"
    )
    swapped = summary.pair_sentence("CE", "focal", {"a: one": equal, "b: two": changed})
    assert "Better: ECE (b 0.500 against 0.700). Worse: macro F1 (b 0.500 against 0.700)." in swapped
    assert any(line.startswith("b, ECE: ") for line in summary.conclusions({"a: one": equal, "b: two": changed}))
    one_seed = {name: {key: value[:1] for key, value in values.items()} for name, values in changed.items()}
    assert "With one seed" in summary.conclusions({"a: one": one_seed})[0]
    assert not any("is best" in line for line in summary.conclusions({"a: one": one_seed}))


def test_tables_are_aligned_markdown(results: list[Result]) -> None:
    for result in results:
        lines = summary.format_table(result.scores).splitlines()
        assert len(lines) == 2 + 2 * result.problem.num_classes + 3
        assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 120
        assert {line.count("|") for line in lines} == {6}
        assert set(lines[1]) == {"|", "-"}


def test_picture(results: list[Result], tmp_path: Path) -> None:
    path = figure.draw_figure(results, tmp_path / "picture.png")
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.size == (1600, 600)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 100


def test_curves_in_the_picture_are_the_formula() -> None:
    axes = Figure().subplots()
    figure._draw_loss_curves(axes)
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
    with pytest.raises(SystemExit) as exit_info:
        command.main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_without_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["classify_demo.py", "--output", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as exit_info:
        command.main()
    assert exit_info.value.code == 2
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_command_prints_tables_and_writes_one_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["classify_demo.py", "--output", str(tmp_path / "new"), "--seeds=1", "--steps=5"])
    assert command.main() == 0
    output = capsys.readouterr().out
    assert output.count("| recall of the rarest class") == 3
    assert "What the numbers say" in output
    assert max(map(len, output.replace(str(tmp_path), "").splitlines())) <= 120
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["classify_demo.png"]
