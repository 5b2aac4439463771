"""A grid of trainings as a resumable study, by any number of processes on any number of machines.

study.py says which cells there are, ledger.py who may train which, trainings.py how one is started and how it ended;
here is the loop that brings them together. It waits without threads and never imports torch. An owner that cannot reach
the ledger for half a lease stops its trainings, before another takes their cells.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from retina.atomic_files import write_text
from retina.command_line import EXIT_FOLDER_IN_USE
from retina.study.cells import Cell, Study, StudyError
from retina.study.estimate import MIN_FREE_BYTES, estimate_seconds
from retina.study.launch import Machine, kill
from retina.study.outcome import (
    checkpoint_time,
    describe_result,
    error_line,
    is_trained,
    last_logged_step,
    write_result,
)
from retina.study.trial_storage import TrialStorage, first_line, is_storage_error, not_failed

MAX_ERRORS = 3  # attempts that end with an error, until a cell is given up
MAX_KILLS = 10  # attempts in a row that are killed before they reach a checkpoint: too little memory, most likely
STATUS_INTERVAL = 60.0  # seconds between two lines about what is running


@dataclass
class _Attempt:
    """A cell that this process owns, and the training of it."""

    cell: Cell
    trial: FrozenTrial
    place: int  # which worker
    process: subprocess.Popen[bytes]
    before: int  # the newest checkpoint at the start, 0 without one
    started: float = field(default_factory=time.monotonic)
    beats: int = 0
    beaten: float = field(default_factory=time.monotonic)
    timing: bool = False  # the training is over, the detector is being timed


def print_with_time(text: str) -> None:
    """A line with the time of day; a terminal that is gone does not stop a study."""
    with contextlib.suppress(OSError):
        print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


class Runner:
    """Trains the cells of a study on this machine until all are done; others may do the same at the same time."""

    def __init__(
        self, study: Study, trial_storage: TrialStorage, machine: Machine, say: Callable[[str], None] = print_with_time
    ) -> None:
        self.study, self.trial_storage, self.machine, self.say = study, trial_storage, machine, say
        self.pause = min(1.0, trial_storage.lease / 10)
        self.running: list[_Attempt] = []
        self.given_up: set[str] = set()
        self.kills: Counter[str] = Counter()
        self.busy: dict[str, float] = {}  # cells that another process trains outside of the ledger, and since when
        self.without_result = 0.0  # since when cells are finished in the ledger and not on the disk; 0: there are none
        self.signals: list[int] = []
        self.stopping = False
        self.last_answer = time.monotonic()  # when the ledger last answered
        self.last_status = 0.0
        self.waiting = ""

    def run(self) -> bool:
        """True when every cell is done, False where some were given up or a signal came.

        Raises StudyError where the ledger is out of reach, KeyboardInterrupt at a second Ctrl-C or SIGTERM.
        """
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle_signal) for number in numbers}  # nohup stays in force
        try:
            while not self._poll():
                time.sleep(self.pause)
        finally:
            for attempt in self.running:
                kill(attempt.process)
                try:
                    self.trial_storage.fail(attempt.trial, "stopped")
                except Exception as error:  # the others are to be stopped too, whatever the storage raises
                    self.say(f"{attempt.cell.label}: the ledger holds it for a lease more: {first_line(error)}")
            for number, handler in before.items():
                signal.signal(number, handler)
        return not self.stopping and not self.given_up

    def _handle_signal(self, number: int, _: object) -> None:
        if self.signals and number != signal.SIGHUP:  # of which a closing terminal may send two
            raise KeyboardInterrupt
        self.signals.append(number)

    def _poll(self) -> bool:
        """Look after what runs, start what can be; True when there is nothing left to do."""
        if self.signals and not self.stopping:
            self.stopping = True
            for attempt in self.running:
                attempt.process.terminate()
            self.say(f"{signal.Signals(self.signals[0]).name}: each training writes a checkpoint; again: at once")
        try:
            for attempt in list(self.running):
                self._check(attempt)
            for trial in self.trial_storage.fail_expired({a.trial._trial_id for a in self.running}, self.pause):
                self.say(f"{trial.user_attrs['label']}: its owner {trial.user_attrs['owner']} is lost")
            trials_by_cell = self.trial_storage.trials_by_cell()
            over = self.stopping or not self._start_cells(trials_by_cell)
            self._log_status(trials_by_cell)
            self.last_answer = time.monotonic()
        except Exception as error:
            if not is_storage_error(error):
                raise
            silent = time.monotonic() - self.last_answer
            if silent > self.trial_storage.lease / 2:
                raise StudyError(
                    f"storage {self.trial_storage.where}: no answer for {silent:.0f} s ({first_line(error)}). The runs "
                    "were stopped; what is finished stays, and the same command goes on from the last checkpoints"
                ) from error
            self.say(f"storage {self.trial_storage.where}: {first_line(error)}; trying again")
            return False
        return over and not self.running

    def _start_cells(self, trials_by_cell: dict[str, list[FrozenTrial]]) -> bool:
        """Fill the free workers; False when every cell is done or given up."""
        owners = {key: not_failed(trials)[0] for key, trials in trials_by_cell.items() if not_failed(trials)}
        is_complete = {key for key, owner in owners.items() if owner.state == TrialState.COMPLETE}
        without_result = [cell for cell in self.study.cells if cell.key in is_complete and not self.study.done(cell)]
        self._wait_for_results(without_result)
        now = time.monotonic()
        self.busy = {key: since for key, since in self.busy.items() if now - since < self.trial_storage.lease}
        left = [cell for cell in self.study.cells if cell.key not in is_complete | self.given_up]
        places = set(range(self.machine.workers)) - {attempt.place for attempt in self.running}
        for cell in left:
            if not places or cell.key in owners or cell.key in self.busy:
                continue
            free = shutil.disk_usage(self.study.folder).free
            if free < MIN_FREE_BYTES:
                raise StudyError(f"{self.study.folder}: the disk is full; the same command goes on once there is room")
            trial = self.trial_storage.claim(cell)
            if trial is None:
                continue
            result = cell.result()
            if result is not None and self.study.done(cell):
                self.trial_storage.complete(trial, ap_of(result))
                self.say(f"{cell.label}: was finished before, {describe_result(result)}")
            else:
                self._start(cell, trial, places.pop())
        return bool(left or without_result)

    def _wait_for_results(self, without_result: list[Cell]) -> None:
        """A network disk may show a result later than the ledger does, but not by more than a lease."""
        self.without_result = (self.without_result or time.monotonic()) if without_result else 0.0
        if without_result and time.monotonic() - self.without_result > self.trial_storage.lease:
            raise StudyError(
                f"{self.trial_storage.where} says that {without_result[0].label} is finished, but "
                f"{without_result[0].folder} has no result: is --output the same folder for all who work on the study? "
                "(Without this storage it is trained again.)"
            )

    def _start(self, cell: Cell, trial: FrozenTrial, place: int) -> None:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_text(cell.folder / "config.yaml", cell.config.to_yaml())
        for path in (*cell.folder.glob("nonfinite_step_*.json"), cell.folder / "failed.txt"):
            path.unlink(missing_ok=True)  # what an earlier attempt had to say
        before = checkpoint_time(cell)
        process = self.machine.start_training(cell.folder, place, cell.folder / "log.txt")
        self.running.append(_Attempt(cell, trial, place, process, before))
        self.say(f"{cell.label}: {'goes on' if before else 'starts'} (worker {place}, {cell.folder})")

    def _check(self, attempt: _Attempt) -> None:
        status = attempt.process.poll()
        if status is not None:
            self._handle_exit(attempt, status)
        elif time.monotonic() - attempt.beaten > self.trial_storage.lease / 6:
            attempt.beats += 1
            if self.trial_storage.heartbeat(attempt.trial, attempt.beats):
                attempt.beaten = time.monotonic()
            else:
                self._drop(attempt)
                self.say(f"{attempt.cell.label}: taken over by another; stopped here")

    def _handle_exit(self, attempt: _Attempt, status: int) -> None:
        cell = attempt.cell
        trained = is_trained(cell)
        if status == 0 and trained and self.study.milliseconds and not attempt.timing and not self.stopping:
            kill(attempt.process)
            attempt.timing = True
            attempt.process = self.machine.start_timing(cell.folder, attempt.place, cell.folder / "log.txt")
            return
        untimed = trained and self.study.milliseconds and not attempt.timing
        if not untimed and (status == 0 or not trained):  # killed after the evaluation, the last checkpoint may lack
            seconds = None if attempt.before else round(time.monotonic() - attempt.started, 1)
            result = write_result(cell, seconds, _milliseconds(cell) if attempt.timing else None)
            if result is not None:
                (cell.folder / "previous.pt").unlink(missing_ok=True)  # there is nothing left to resume
                self.trial_storage.complete(attempt.trial, ap_of(result))
                self._drop(attempt)
                took = f" in {timedelta(seconds=round(seconds))}" if seconds else ""
                self.say(f"{cell.label}: {describe_result(result)}{took}")
                return
        self._handle_failure(attempt, status)

    def _handle_failure(self, attempt: _Attempt, status: int) -> None:
        """The training ended before its end: say why, and give the cell up where that was once too often."""
        cell, log = attempt.cell, attempt.cell.folder / "log.txt"
        if self.stopping:
            why = "stopped"
        elif status == EXIT_FOLDER_IN_USE:
            why = "another process trains in this folder"
            self.busy[cell.key] = time.monotonic()
        elif status > 0:
            why = f"error: {error_line(log)}"
        else:
            why = f"killed by {signal.Signals(-status).name}" if status else "stopped by a signal"
            progressed = checkpoint_time(cell) != attempt.before
            self.kills[cell.key] = 0 if progressed else self.kills[cell.key] + 1
        self.trial_storage.fail(attempt.trial, why)
        self._drop(attempt)
        self.say(f"{cell.label}: {why} ({log})")
        if len(self.trial_storage.errors(cell)) >= MAX_ERRORS:
            self._give_up(cell, f"{MAX_ERRORS} attempts failed, the last with {why}")
        elif self.kills[cell.key] >= MAX_KILLS:
            self._give_up(cell, f"killed {MAX_KILLS} times without reaching a checkpoint (too little memory?)")

    def _give_up(self, cell: Cell, why: str) -> None:
        self.given_up.add(cell.key)
        write_text(cell.folder / "failed.txt", why)
        self.say(f"{cell.label}: given up: {why}; the others go on")

    def _drop(self, attempt: _Attempt) -> None:
        kill(attempt.process)
        self.running.remove(attempt)

    def _log_status(self, trials_by_cell: dict[str, list[FrozenTrial]]) -> None:
        mine = {attempt.trial._trial_id for attempt in self.running}
        owners = [not_failed(trials)[0] for trials in trials_by_cell.values() if not_failed(trials)]
        others = [t for t in owners if t.state == TrialState.RUNNING and t._trial_id not in mine]
        if not self.running and others and not self.stopping:
            waiting = "; ".join(f"{t.user_attrs['label']} by {t.user_attrs['owner']}" for t in others)
            if waiting != self.waiting:
                self.waiting = waiting
                self.say(f"nothing left to start; waiting for {waiting}")
        if time.monotonic() - self.last_status < STATUS_INTERVAL or not self.running:
            return
        self.last_status = time.monotonic()
        done = sum(self.study.done(cell) for cell in self.study.cells)
        at = "; ".join(
            f"{a.cell.label}: step {last_logged_step(a.cell)}/{a.cell.config.train.steps}" for a in self.running
        )
        left = estimate_seconds(self.study, self.machine.workers)
        about = f", about {timedelta(seconds=round(left))} left" if left is not None else ""
        self.say(f"{done}/{len(self.study.cells)} done{about}; running: {at}")


def ap_of(result: dict[str, Any]) -> float:
    """AP between 0 and 1; 0 for a training that diverged or data that has nothing to measure."""
    return float((result["metrics"] or {}).get("AP") or 0.0)


def _milliseconds(cell: Cell) -> float:
    metrics = json.loads((cell.folder / "metrics.json").read_text(encoding="utf-8"))
    return float(metrics["milliseconds"])
