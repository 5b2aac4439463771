"""The rule of the trial storage: one owner for each cell, whatever happens to its process. No run is started here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from study_helpers import URLS, MakeStudy, check_race, run_cells, trial_states

from retina.study import trial_storage
from retina.study.cells import Study, StudyError
from retina.study.study_file import load_study
from retina.study.trial_storage import TrialStorage, check_same_study


@URLS
def test_of_two_claims_at_the_same_time_the_first_gets_the_cell(make_study: MakeStudy, url: str | None) -> None:
    study = make_study([0, 1])
    check_race(study, url and url.format(study.file.parent))


@URLS
def test_a_cell_is_lost_without_a_heartbeat_and_kept_with_one(make_study: MakeStudy, url: str | None) -> None:
    study = make_study([0, 1])
    url = url and url.format(study.file.parent)
    owner, observer = TrialStorage(study, url, 0.4), TrialStorage(study, url, 10)  # the lease of the owner counts
    dead, alive = (owner.claim(cell) for cell in study.cells)
    assert dead and alive
    expired: list[str] = []
    for count in range(30):
        assert owner.heartbeat(alive, count)
        expired += [trial.user_attrs["label"] for trial in observer.fail_expired(set(), 0.03)]
        time.sleep(0.03)
    assert expired == ["gamma 0, seed 0"]
    assert not owner.heartbeat(dead, 99), "the owner sees that it lost the trial"
    assert trial_states(study, url) == [["FAIL"], ["RUNNING"]]
    assert observer.claim(study.cells[0]) is not None


def test_an_observer_that_was_stopped_expires_no_trial(make_study: MakeStudy) -> None:
    study = make_study([0])
    owner, observer = TrialStorage(study, None, 0.4), TrialStorage(study, None, 0.4)
    assert owner.claim(study.cells[0])
    observer.fail_expired(set(), 0.03)
    time.sleep(0.6)
    assert observer.fail_expired(set(), 0.03) == [] and observer.fail_expired(set(), 0.03) == []


def modification_times(study: Study) -> list[tuple[Path, int]]:
    """Of all files but the trial storage, to which every process that opens it adds a line."""
    files = (path for path in study.folder.parent.rglob("*") if path.is_file() and path.name != "ledger.jsonl")
    return sorted((path, path.stat().st_mtime_ns) for path in files)


def test_a_changed_study_is_refused_and_nothing_is_lost(make_study: MakeStudy) -> None:
    study = make_study([0, 1])
    assert run_cells(study)
    before = modification_times(study)
    changed = make_study([0, 3])
    with pytest.raises(StudyError) as error:
        TrialStorage(changed, None, 10)
    for part in ["1 cells are new (gamma 3, seed 0)", "1 cells are gone (gamma 1, seed 0)", "under another name"]:
        assert part in str(error.value)
    steps = load_study(study.file.with_name("study.yaml"), overrides=["train.steps=9"], output=study.folder.parent)
    with pytest.raises(StudyError, match=r"train.steps was 6, is 9"):
        TrialStorage(steps, None, 10)
    assert modification_times(study) == before


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:secret@127.0.0.1:1/x", r"postgresql://me:\*\*\*@127\.0\.0\.1:1/x: cannot be reached: .+"),
        ("redis://127.0.0.1:1/0", r"redis://127\.0\.0\.1:1/0: cannot be reached: .+"),
        ("nosuch://x", r"nosuch://x: cannot be reached: .*nosuch"),
        ("nonsense:secret", r"--storage: expected a URL such as postgresql://"),
    ],
)
def test_a_storage_out_of_reach_is_named_without_its_password(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    monkeypatch.setattr(trial_storage.time, "sleep", lambda _: None)
    with pytest.raises(StudyError, match=message) as error:
        TrialStorage(make_study([0]), url, 10)
    assert "secret" not in str(error.value)


def test_an_incomplete_line_in_the_journal_is_removed(make_study: MakeStudy) -> None:
    study = make_study([0, 1])
    storage = TrialStorage(study, None, 10)
    assert storage.claim(study.cells[0])
    with Path(storage.location).open("a") as file:
        file.write('{"op_code":4,"worker')
    assert storage.claim(study.cells[1])
    assert trial_states(study) == [["RUNNING"], ["RUNNING"]]


def test_the_lock_of_a_dead_process_is_removed(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lock is a link, which must not be broken: Optuna would wait for ever at a broken link."""
    monkeypatch.chdir(tmp_path)
    study = make_study([0])
    relative = load_study(study.file, output=Path("out"))
    assert not relative.folder.is_absolute()
    storage = TrialStorage(relative, None, 10)
    backend = storage.storage._backend  # type: ignore[attr-defined]
    backend.lock.acquire()  # and never released
    assert Path("out/study-tiny/ledger.jsonl.lock").exists(), "exists() is False for a broken link"
    backend.lock.grace_period = 1
    assert storage.claim(relative.cells[0])


def test_trials_have_the_parameters_that_optunas_dashboard_shows(make_study: MakeStudy) -> None:
    study = make_study([0.5])
    storage = TrialStorage(study, None, 10)
    assert storage.claim(study.cells[0])
    (trial,) = storage.optuna_study.get_trials()
    assert trial.params == {"loss.gamma": "0.5", "seed": "0"} and trial.state == TrialState.RUNNING


@URLS
def test_the_check_before_a_report_creates_nothing(make_study: MakeStudy, url: str | None) -> None:
    study = make_study([0, 1])
    url = url and url.format(study.file.parent)
    other = replace(study, cells=study.cells[:1])
    check_same_study(other, url)  # never started: there is nothing to lose, and other settings may still be the first
    assert not (study.folder / "ledger.jsonl").exists()
    TrialStorage(study, url, lease=60)
    check_same_study(study, url)
    with pytest.raises(StudyError, match=r"1 cells are gone"):
        check_same_study(other, url)
