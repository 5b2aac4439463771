"""`--change` at `--resume`: what may change, from which step on, and that a kill after it changes nothing."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_helpers import run_main
from train_helpers import settings, stop_after, weights

from retina.config import Config
from retina.model import checkpoint
from retina.train import loop
from retina.train.errors import RunError
from retina.train.loop import train

pytestmark = pytest.mark.slow
CHANGES = (
    "train.steps=10",
    "train.lr=0.004",
    "train.schedule=cosine",
    "train.milestones=[0.9]",
    "train.accumulate=2",
    "train.eval_batch=2",
    "data.unreadable=skip",
)
NO_EVALUATION = "train.eval_every=0"  # but after the last step
KEYS = [change.split("=")[0] for change in CHANGES]
EXPECTED = [
    {"step": 3, "key": "train.steps", "from": 6, "to": 10},
    {"step": 3, "key": "train.lr", "from": 0.01, "to": 0.004},
    {"step": 3, "key": "train.schedule", "from": "steps", "to": "cosine"},
    {"step": 3, "key": "train.milestones", "from": [2 / 3, 8 / 9], "to": [0.9]},
    {"step": 3, "key": "train.accumulate", "from": 1, "to": 2},
    {"step": 3, "key": "train.eval_batch", "from": 8, "to": 2},
    {"step": 3, "key": "data.unreadable", "from": "error", "to": "skip"},
]


@pytest.fixture(scope="module")
def stopped(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps that was stopped after step 3. A test must not change it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with stop_after(3):
        train(settings(tiny_yaml, folder, NO_EVALUATION))
    return folder


def copy_of(stopped: Path, tiny_yaml: Path, folder: Path, *flags: str) -> Config:
    shutil.copytree(stopped, folder)
    return settings(tiny_yaml, folder, NO_EVALUATION, *flags)


@pytest.fixture(scope="module")
def changed(stopped: Path, tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that was continued with CHANGES to its end."""
    config = copy_of(stopped, tiny_yaml, tmp_path_factory.mktemp("changed") / "run", *CHANGES)
    train(config, True, KEYS)
    return config.run_dir


def digest(folder: Path) -> str:
    return checkpoint.digest({**checkpoint.load(folder / "last.pt"), "config": ""})


def test_the_learning_rate_changes_from_the_next_step_on(changed: Path, stopped: Path) -> None:
    rows = list(csv.DictReader((changed / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    before = list(csv.DictReader((stopped / "metrics.csv").open()))
    assert rows[:3] == before
    # By hand: half a cosine from step 2, the end of the warm-up, to step 10, in float64.
    by_hand = [0.00341421356, 0.00276536686, 0.002, 0.00123463314, 0.000585786438, 0.000152240935]
    assert [float(row["lr"]) for row in rows[4:]] == pytest.approx(by_hand, rel=1e-6)


def test_the_change_is_recorded(changed: Path) -> None:
    assert json.loads((changed / "changes.json").read_text()) == EXPECTED
    state = checkpoint.load(changed / "last.pt")
    assert state["changes"] == EXPECTED and "steps: 10" in state["config"] and state["step"] == 10
    assert [entry["step"] for entry in json.loads((changed / "eval.json").read_text())] == [10]


def test_a_run_stopped_after_the_change_ends_with_the_same_bits(
    changed: Path, stopped: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    """The same command continues it: the change is not made again at the later step."""
    config = copy_of(stopped, tiny_yaml, tmp_path / "run", *CHANGES)
    for step in (5, 8):
        with stop_after(step):
            train(config, True, KEYS)
    train(config, True)  # also where the changed values are plain settings now
    assert digest(config.run_dir) == digest(changed)
    for name in ("metrics.csv", "eval.json", "changes.json"):
        assert (config.run_dir / name).read_bytes() == (changed / name).read_bytes()


def test_a_run_killed_before_the_change_is_saved_ends_with_the_same_bits(
    changed: Path, stopped: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of(stopped, tiny_yaml, tmp_path / "run", *CHANGES)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_save_checkpoint", killed)
        train(config, True, KEYS)
    assert "steps: 10" in (config.run_dir / "config.yaml").read_text()
    assert (
        "changes" not in checkpoint.load(config.run_dir / "last.pt")
        or not checkpoint.load(config.run_dir / "last.pt")["changes"]
    )
    train(config, True, KEYS)
    assert digest(config.run_dir) == digest(changed)


def test_a_damaged_checkpoint_does_not_move_the_change(
    changed: Path, stopped: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    """previous.pt is never from before the step of the change."""
    config = copy_of(stopped, tiny_yaml, tmp_path / "run", *CHANGES)
    with stop_after(4):
        train(config, True, KEYS)
    assert checkpoint.load(config.run_dir / "previous.pt")["step"] == 3
    (config.run_dir / "last.pt").write_bytes(b"damaged")
    train(config, True, KEYS)
    assert digest(config.run_dir) == digest(changed)


def test_a_finished_run_goes_on(changed: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    config = copy_of(changed, tiny_yaml, tmp_path / "run", *CHANGES, "train.steps=11")
    train(config, True, ["train.steps"])
    assert checkpoint.load(config.run_dir / "last.pt")["step"] == 11
    changes = json.loads((config.run_dir / "changes.json").read_text())
    assert changes == [*EXPECTED, {"step": 10, "key": "train.steps", "from": 10, "to": 11}]
    assert [entry["step"] for entry in json.loads((config.run_dir / "eval.json").read_text())] == [10, 11]


def test_everything_else_is_refused(stopped: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    for flags, keys, message in [
        (["train.lr=0.02"], [], r"train\.lr was 0\.01, is 0\.02.*; --change train\.lr=0\.02 changes it from the next"),
        (["train.lr=0.02", "data.flip=0"], ["train.lr"], r"data\.flip was 0\.5, is 0\.0\); use the same settings"),
        (["train.steps=2"], ["train.steps"], r"has 3 steps done: train\.steps=2 is too few"),
    ]:
        with pytest.raises(RunError, match=message):
            train(settings(tiny_yaml, stopped, NO_EVALUATION, *flags), True, keys)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    assert weights(stopped)  # still valid


@pytest.mark.parametrize("damaged", [False, True])
def test_a_best_checkpoint_of_a_later_step_is_discarded(
    changed: Path, stopped: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """A run that was killed after its evaluation at step 5 goes on with a change from step 3, at the second try."""
    config = copy_of(stopped, tiny_yaml, tmp_path / "run", *CHANGES)
    state = checkpoint.load(config.run_dir / "last.pt")
    checkpoint.save(config.run_dir / "best.pt", state | {"step": 5, "best": 0.9})
    state["best"] = 0.8
    checkpoint.save(config.run_dir / "last.pt", state)
    if damaged:
        (config.run_dir / "best.pt").write_bytes(b"damaged")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_save_checkpoint", killed)
        train(config, True, KEYS)
    train(config, True, KEYS)
    assert digest(config.run_dir) == digest(changed)
    assert checkpoint.load(config.run_dir / "best.pt")["step"] == 10


def test_the_checkpoint_says_which_settings_it_has(stopped: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    config = copy_of(stopped, tiny_yaml, tmp_path / "run")
    (config.run_dir / "config.yaml").unlink()
    other = settings(tiny_yaml, config.run_dir, NO_EVALUATION, "seed=7", "loss.gamma=0")
    with pytest.raises(RunError, match=r"other settings \(seed was 0, is 7, loss\.gamma was 2\.0, is 0\.0\)"):
        train(other, True)
    train(config, True)
    (config.run_dir / "best.pt").rename(config.run_dir / "last.pt")
    with pytest.raises(RunError, match=r"weights only, .*because it is a best\.pt; .*model\.weights=FILE"):
        train(settings(tiny_yaml, config.run_dir, NO_EVALUATION, "train.steps=9"), True, ["train.steps"])


def test_changed_annotations_are_said(
    stopped: Path, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where an image or a box differs, not where the file is formatted in another way."""
    config = copy_of(stopped, tiny_yaml, tmp_path / "run")
    file, original = Path(config.data.train_annotations), Path(config.data.train_annotations).read_text()
    tree = json.loads(original)
    try:
        for step, removed in ((4, 0), (5, 1)):
            file.write_text(json.dumps({**tree, "annotations": tree["annotations"][removed:]}, indent=3))
            with stop_after(step):
                train(config, True)
            output = capsys.readouterr().out
            assert "resumed after step" in output
            assert ("the training annotations have changed since then" in output) == bool(removed)
    finally:
        file.write_text(original)


def test_weights_alone_cannot_go_on(changed: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    flags = [*CHANGES, "train.keep=weights"]
    config = copy_of(changed, tiny_yaml, tmp_path / "run", *flags)
    train(config, True)
    before = digest(config.run_dir)
    with pytest.raises(RunError, match=r"step 10 has weights only, because the run ended with train\.keep=weights"):
        train(settings(tiny_yaml, config.run_dir, NO_EVALUATION, *flags, "train.steps=12"), True, ["train.steps"])
    assert digest(config.run_dir) == before


def test_the_command(stopped: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    config = copy_of(stopped, tiny_yaml, tmp_path / "run")
    command = [tiny_yaml, f"output_dir={config.run_dir}", NO_EVALUATION]
    done = run_main("train.py", *command, "--resume", "--change", "train.lr=0.004", "--change", "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert "from step 3 on: train.lr 0.01 -> 0.004" in done.stdout and "step 4/4" in done.stdout
    for arguments, message in [
        (["--resume", "--change", "data.flip=0"], "--change data.flip: only train.steps, train.lr, train.schedule"),
        (["--change", "train.lr=1"], "--change needs --resume"),
        (["--resume", "--change", "train.steps=0"], "train.steps: given 0"),
    ]:
        refused = run_main("train.py", *command, *arguments)
        assert refused.returncode == 2 and message in refused.stderr
