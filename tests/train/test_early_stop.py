"""`train.early_stop` and `train.best_metric`, with evaluations whose numbers are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train_helpers import settings, stop_after, weights

from retina.config import COCO_METRICS, Config
from retina.evaluate import Evaluation
from retina.model import checkpoint
from retina.study.cells import Cell
from retina.study.outcome import is_trained
from retina.train import RunError, loop
from retina.train.loop import train

pytestmark = pytest.mark.slow
# By step. AP: the best at step 2, equal at 4. AP50: the best at step 3.
NUMBERS = {1: (0.1, 0.2), 2: (0.4, 0.3), 3: (0.2, 0.5), 4: (0.4, 0.4), 5: (0.3, None), 6: (0.9, 0.1), 7: (0.9, 0.1)}
FLAGS = ("train.steps=7", "train.eval_every=1", "train.checkpoint_every=100", "train.log_every=100", "train.ema=0")


@pytest.fixture(autouse=True)
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step of the next evaluation: each step has one, also in a run that is stopped and resumed."""
    evaluated = [1]

    def score(*_: Any) -> Evaluation:
        ap, ap50 = NUMBERS[evaluated[0]]
        evaluated[0] += 1
        return Evaluation(dict.fromkeys(COCO_METRICS, 0.0) | {"AP": ap, "AP50": ap50, "per_class": {}}, {})

    def log_evaluation(log: Any, step: int, evaluation: Evaluation, *_: Any) -> None:
        assert evaluation.metrics["AP"] == NUMBERS[step][0]
        log._write_evaluations([*log.evaluations(), {"step": step, **evaluation.metrics}])

    monkeypatch.setattr(loop, "inference_on_dataset", lambda *_: ([], {}))
    monkeypatch.setattr(loop, "score", score)
    monkeypatch.setattr(loop, "confirm", lambda evaluation, *_: (evaluation, ""))
    monkeypatch.setattr(loop.Logbook, "log_evaluation", log_evaluation)
    return evaluated


def steps(config: Config) -> tuple[int, int]:
    """Of last.pt and of best.pt."""
    last, best = (checkpoint.load(config.run_dir / name)["step"] for name in ("last.pt", "best.pt"))
    return last, best


@pytest.mark.parametrize(
    ("flags", "last", "best"),
    [
        (["train.early_stop=2"], 4, 2),  # an equal AP is no new best
        (["train.early_stop=3"], 5, 2),
        (["train.early_stop=4"], 7, 6),
        (["train.early_stop=2", "train.best_metric=AP50"], 6, 3),  # no value is no evaluation
        ([], 7, 6),
    ],
)
def test_a_run_ends_without_a_new_best(
    tiny_yaml: Path, tmp_path: Path, flags: list[str], last: int, best: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tiny_yaml, tmp_path / "run", *FLAGS, *flags)
    assert train(config)["step"] == last
    assert steps(config) == (last, best)
    output = capsys.readouterr().out
    assert ("stopped early after step" in output) == (last < 7)
    cell = Cell({}, 0, config, "key")
    assert is_trained(cell)
    entries = json.loads((config.run_dir / "eval.json").read_text())
    (config.run_dir / "eval.json").write_text(json.dumps(entries[:-1]))
    assert not is_trained(cell)


def test_a_stopped_and_resumed_run_ends_at_the_same_step(
    tiny_yaml: Path, tmp_path: Path, evaluated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by a signal before an evaluation, and before the one that ends the run."""
    whole = settings(tiny_yaml, tmp_path / "whole", *FLAGS, "train.early_stop=3")
    train(whole)
    evaluated[0] = 1
    parts = settings(tiny_yaml, tmp_path / "parts", *FLAGS, "train.early_stop=3")
    for step in (2, 5):
        with stop_after(step):
            train(parts, resume=True)
    train(parts, resume=True)
    assert steps(parts) == steps(whole) == (5, 2) and weights(parts.run_dir) == weights(whole.run_dir)
    for name in ("last.pt", "best.pt"):
        a, b = ({**checkpoint.load(c.run_dir / name), "config": ""} for c in (whole, parts))
        assert checkpoint.digest(a) == checkpoint.digest(b)
    assert (parts.run_dir / "eval.json").read_bytes() == (whole.run_dir / "eval.json").read_bytes()
    capsys.readouterr()
    before = (parts.run_dir / "last.pt").read_bytes()
    train(parts, resume=True)
    assert "nothing left to do: the run ended after step 5" in capsys.readouterr().out
    assert (parts.run_dir / "last.pt").read_bytes() == before


def test_a_change_after_an_early_stop_is_refused(tiny_yaml: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "train.early_stop=2"]
    config = settings(tiny_yaml, tmp_path / "run", *flags)
    train(config)
    files = {path: path.read_bytes() for path in config.run_dir.iterdir()}
    longer = settings(tiny_yaml, tmp_path / "run", *flags, "train.steps=9")
    with pytest.raises(
        RunError, match=r"ended early after step 4 \(train.early_stop=2\), so a --change would do nothing"
    ):
        train(longer, resume=True, changed_keys=["train.steps"])
    assert {path: path.read_bytes() for path in config.run_dir.iterdir()} == files


def test_only_the_weights_are_kept_of_a_run_that_stopped_early(tiny_yaml: Path, tmp_path: Path) -> None:
    config = settings(tiny_yaml, tmp_path / "run", *FLAGS, "train.early_stop=2", "train.keep=weights")
    train(config)
    assert [path.name for path in config.run_dir.glob("*.pt")] == ["last.pt"]
    assert checkpoint.load(config.run_dir / "last.pt")["optimizer"] == {}
    train(config, resume=True)
    assert checkpoint.load(config.run_dir / "last.pt")["step"] == 4
