"""The loop of a study, with fake runs. Real runs are killed in test_ablate_kill.py."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from optuna.trial import FrozenTrial
from study_helpers import MakeStudy, make_runner, num_starts, run_cells, trial_states

from retina.study import loop
from retina.study.cells import StudyError
from retina.study.outcome import write_result
from retina.study.trial_storage import TrialStorage

pytestmark = pytest.mark.slow


def send_signal(number: int, seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def test_each_cell_is_run_once_in_this_study_and_in_another(make_study: MakeStudy) -> None:
    study = make_study([0, 1, 2])
    assert run_cells(study)
    assert trial_states(study) == [["COMPLETE"]] * 3 and num_starts(study) == [1, 1, 1]
    assert [cell.result()["metrics"]["AP"] for cell in study.cells] == [0.0, 0.1, 0.2]  # type: ignore[index]
    other = make_study([2, 1, 3], "other")
    runner, messages = make_runner(other)
    assert runner.run() and num_starts(other) == [1, 1, 1]
    assert "gamma 2, seed 0: was finished before, AP 20.0" in messages
    assert trial_states(other) == [["COMPLETE"]] * 3
    assert run_cells(study) and trial_states(study) == [["COMPLETE"]] * 3


def test_errors_are_retried_then_reported_and_the_other_cells_continue(make_study: MakeStudy) -> None:
    study = make_study([0, 1, 2], **{"g0.0": ["error"], "g1.0": ["error", "error", "finish"]})
    runner, _ = make_runner(study)
    assert not runner.run()
    assert trial_states(study) == [["FAIL"] * 3, ["FAIL", "FAIL", "COMPLETE"], ["COMPLETE"]]
    assert study.cells[0].failure() == "3 trials failed, the last with error: the disk is on fire"
    assert runner.given_up == {study.cells[0].key} and study.cells[1].failure() is None
    (study.file.parent / "plan.json").write_text("{}")  # repaired; the same command tries again
    assert run_cells(study) and trial_states(study)[0] == ["FAIL"] * 3 + ["COMPLETE"]
    assert study.cells[0].failure() is None


def test_kills_are_retried_more_often_than_errors_but_not_forever(make_study: MakeStudy) -> None:
    study = make_study([0, 1], **{"g0.0": ["kill"] * 5 + ["finish"], "g1.0": ["kill"]})
    assert not run_cells(study)
    assert num_starts(study) == [6, loop.MAX_KILLS] and "too little memory" in str(study.cells[1].failure())


def test_a_loss_that_is_not_finite_is_a_result(make_study: MakeStudy) -> None:
    study = make_study([0], **{"g0.0": ["diverge"]})
    assert run_cells(study) and num_starts(study) == [1]
    result = study.cells[0].result()
    assert result is not None and result["diverged"] == 4 and result["metrics"] is None


def test_the_time_left_follows_the_pace_of_this_process(make_study: MakeStudy) -> None:
    study = make_study([0, 1, 2])
    steps = study.cells[0].config.train.steps
    assert steps % 2 == 0
    study.cells[1].folder.mkdir(parents=True)
    metrics = study.cells[1].folder / "metrics.csv"
    metrics.write_text(f"step,loss\n{steps // 2},1\n")  # by an earlier process: half of a cell
    runner, _ = make_runner(study)
    assert runner._time_left() == ""
    metrics.write_text(f"step,loss\n{steps},1\n")
    runner.start_time = time.monotonic() - 100
    assert runner._time_left() == ", about 0:06:40 left", "100 s for half a cell, and two cells are left"
    study.cells[2].folder.mkdir()
    (study.cells[2].folder / "nonfinite_step_1.json").write_text('{"step": 1}')
    assert write_result(study.cells[2], 1.0, None, "")
    assert runner._time_left() == ", about 0:03:20 left", "a cell that ended early is not counted as done in full"


def test_a_study_with_milliseconds_times_the_trained_detectors(make_study: MakeStudy) -> None:
    study = make_study([0, 1])
    assert run_cells(study)
    timed = make_study([0, 1, 2], "timed", "milliseconds: true")
    runner, _ = make_runner(timed)
    assert runner.run()
    assert all("error: out of memory" in e for c in timed.cells for e in runner.trial_storage.errors(c))
    assert trial_states(timed) == [["FAIL", "COMPLETE"]] * 3, "the first timing of each cell fails"
    for cell in timed.cells:
        result = cell.result()
        assert result is not None and result["milliseconds"] == 12.5 and timed.is_done(cell)
    assert run_cells(make_study([0, 1])) and num_starts(study) == [3, 3], "no new start without milliseconds"


def test_a_signal_stops_the_runs_and_the_same_command_continues(make_study: MakeStudy) -> None:
    study = make_study([0, 1, 2], **{"g1.0": ["wait", "finish"]})
    runner, messages = make_runner(study)
    send_signal(signal.SIGTERM, 1.5)
    assert not runner.run()
    assert trial_states(study)[1] == ["FAIL"]
    assert "gamma 1, seed 0: stopped" in " ".join(messages)
    assert run_cells(study) and trial_states(study)[1] == ["FAIL", "COMPLETE"]


def test_a_missing_result_is_waited_for_then_reported(make_study: MakeStudy) -> None:
    """As on a machine with another --output folder than the machine that ran the cell."""
    study = make_study([0, 1])
    assert run_cells(study)
    result = study.cells[0].folder / "result.json"
    text = result.read_text()
    result.unlink()
    threading.Timer(0.5, result.write_text, [text]).start()
    assert run_cells(study) and num_starts(study) == [1, 1], "a network disk may be late"
    result.unlink()
    with pytest.raises(StudyError, match=r"gamma 0, seed 0 is finished, but .* has no result: is --output the same"):
        run_cells(study, lease=1)


def test_a_second_signal_stops_at_once_and_frees_the_cells(make_study: MakeStudy) -> None:
    study = make_study([0], **{"g0.0": ["deaf", "finish"]})
    runner, _ = make_runner(study, lease=1000)
    for seconds in (1.5, 2.0):
        send_signal(signal.SIGTERM, seconds)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert runner.running[0].process.poll() == -9 and trial_states(study) == [["FAIL"]]
    assert run_cells(study), "without waiting for a lease"


def test_nohup_is_respected(make_study: MakeStudy) -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        study = make_study([0], **{"g0.0": ["short"]})
        send_signal(signal.SIGHUP, 0.5)
        assert run_cells(study)
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_process_that_lost_its_trial_stops_the_run(make_study: MakeStudy) -> None:
    study = make_study([0], **{"g0.0": ["wait", "finish"]})
    runner, messages = make_runner(study, lease=1)
    other = TrialStorage(study, None, 10)

    def fail_trial() -> None:
        (trial,) = other.trials_by_cell()[study.cells[0].key]
        other.fail(trial, "lost")

    threading.Timer(1, fail_trial).start()
    assert runner.run() and num_starts(study) == [2]
    assert "gamma 0, seed 0: taken over by another process; stopped here" in messages


def test_without_an_answer_of_the_storage_the_runs_stop_in_time(make_study: MakeStudy) -> None:
    """In time: before a process that still reaches the storage fails the trials."""
    study = make_study([0], **{"g0.0": ["wait"]})
    (runner, _), other = make_runner(study, lease=2), TrialStorage(study, None, 2)
    expired: list[FrozenTrial] = []

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def break_storage_and_observe() -> None:
        storage = runner.trial_storage
        storage.trials_by_cell = storage.heartbeat = broken  # type: ignore[method-assign,assignment]
        while runner.running[0].process.poll() is None:
            expired.extend(other.fail_expired(set(), 0.05))
            time.sleep(0.05)

    observer = threading.Timer(0.5, break_storage_and_observe)
    observer.start()
    with pytest.raises(StudyError, match=r"no answer for .*No space left on device.*the same command continues"):
        runner.run()
    observer.join()
    assert expired == [] and runner.running[0].process.poll() is not None


def test_a_folder_in_which_another_process_trains_is_tried_again_later(make_study: MakeStudy) -> None:
    study = make_study([0], **{"g0.0": ["busy", "busy under torchrun"] * 2 + ["finish"]})
    runner, _ = make_runner(study, lease=1)
    assert runner.run() and num_starts(study) == [5] and not runner.trial_storage.errors(study.cells[0])


def test_files_of_an_earlier_trial_do_not_count_for_a_later_one(make_study: MakeStudy) -> None:
    study = make_study([0], **{"g0.0": ["half", "finish"]})
    study.cells[0].folder.mkdir(parents=True)
    # The process of the earlier trial died before it wrote result.json.
    (study.cells[0].folder / "nonfinite_step_2.json").write_text('{"step": 2}')
    assert run_cells(study)
    result = study.cells[0].result()
    assert result is not None and result["diverged"] is None and num_starts(study) == [2]


def test_a_run_killed_after_its_last_evaluation_is_resumed(make_study: MakeStudy) -> None:
    """Its last checkpoint may be missing."""
    study = make_study([0], **{"g0.0": ["late", "finish"]})
    assert run_cells(study) and num_starts(study) == [2]
    assert trial_states(study) == [["FAIL", "COMPLETE"]]
