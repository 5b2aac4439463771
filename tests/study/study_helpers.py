"""Shared by the tests of the trial storage and of the loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial

from retina.study.cells import Study
from retina.study.launch import Machine
from retina.study.loop import Runner
from retina.study.trial_storage import TrialStorage

MakeStudy = Callable[..., Study]
TOOL = Path(__file__).parents[2] / "tools/ablate.py"
URLS = pytest.mark.parametrize("url", [None, "sqlite:///{}/ledger.db"], ids=["journal", "sqlite"])


def run_ablate_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=200)


def make_runner(study: Study, lease: float = 10, workers: int = 2) -> tuple[Runner, list[str]]:
    """A runner of the fake tools in the folder of the study file, and the list of its messages."""
    messages: list[str] = []
    machine = Machine(workers, 1, [], study.file.parent)
    runner = Runner(study, TrialStorage(study, None, lease), machine, messages.append)
    runner.poll_interval = 0.02
    return runner, messages


def run_cells(study: Study, lease: float = 10) -> bool:
    return make_runner(study, lease)[0].run()


def trial_states(study: Study, url: str | None = None) -> list[list[str]]:
    """The states of the trials of each cell."""
    trials_by_cell = TrialStorage(study, url, 10).trials_by_cell()
    return [[trial.state.name for trial in trials_by_cell[cell.key]] for cell in study.cells]


def num_starts(study: Study) -> list[int]:
    """How often the run of each cell was started."""
    return [(cell.folder / "starts").stat().st_size for cell in study.cells]


def check_race(study: Study, url: str | None) -> None:
    """A process sees a free cell, a second process claims it, then the first adds its trial and must withdraw it."""
    cell = study.cells[0]
    slow, quick = TrialStorage(study, url, 10), TrialStorage(study, url, 10)
    add_trial, owner = slow.optuna_study.add_trial, None

    def add_late(trial: FrozenTrial) -> None:
        nonlocal owner
        owner = quick.claim(cell)
        add_trial(trial)

    slow.optuna_study.add_trial = add_late  # type: ignore[method-assign]
    assert slow.claim(cell) is None and owner is not None
    assert quick.claim(cell) is None and slow.heartbeat(owner, 1)
    trials = quick.trials_by_cell()[cell.key]
    assert [trial.state.name for trial in trials] == ["RUNNING", "FAIL"]
    assert trials[1].user_attrs["ended"].startswith("withdrawn")
    quick.fail(owner, "error: x")
    assert not slow.heartbeat(owner, 2)
    retry = quick.claim(cell)
    assert retry is not None and retry.number == 2
    quick.complete(retry, 0.5)
    quick.complete(retry, 0.7)  # has no effect
    assert quick.claim(cell) is None and quick.trials_by_cell()[cell.key][2].value == 0.5
