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
from retina.command_line import BUSY
from retina.study.cells import Cell, Study, StudyError
from retina.study.estimate import LEAST_FREE, estimate
from retina.study.launch import Machine, kill
from retina.study.outcome import is_trained, last_words, newest_checkpoint, outcome, step_of, write_result
from retina.study.trial_storage import Ledger, first_line, is_of_storage, live

ERRORS = 3  # attempts that end with an error, until a cell is given up
KILLS = 10  # attempts in a row that are killed before they reach a checkpoint: too little memory, most likely
STATUS = 60.0  # seconds between two lines about what is running


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


def say(text: str) -> None:
    """A line with the time of day; a terminal that is gone does not stop a study."""
    with contextlib.suppress(OSError):
        print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


class Runner:
    """Trains the cells of a study on this machine until all are done; others may do the same at the same time."""

    def __init__(self, study: Study, ledger: Ledger, machine: Machine, say: Callable[[str], None] = say) -> None:
        self.study, self.ledger, self.machine, self.say = study, ledger, machine, say
        self.pause = min(1.0, ledger.lease / 10)
        self.running: list[_Attempt] = []
        self.given_up: set[str] = set()
        self.kills: Counter[str] = Counter()
        self.busy: dict[str, float] = {}  # cells that another process trains outside of the ledger, and since when
        self.lacking = 0.0  # since when cells are finished in the ledger and not on the disk; 0: there are none
        self.signals: list[int] = []
        self.stopping = False
        self.reached = time.monotonic()  # when the ledger last answered
        self.told = 0.0
        self.waiting = ""

    def run(self) -> bool:
        """True when every cell is done, False where some were given up or a signal came.

        Raises StudyError where the ledger is out of reach, KeyboardInterrupt at a second Ctrl-C or SIGTERM.
        """
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in numbers}  # nohup stays in force
        try:
            while not self._round():
                time.sleep(self.pause)
        finally:
            for attempt in self.running:
                kill(attempt.process)
                try:
                    self.ledger.fail(attempt.trial, "stopped")
                except Exception as error:  # the others are to be stopped too, whatever the storage raises
                    self.say(f"{attempt.cell.label}: the ledger holds it for a lease more: {first_line(error)}")
            for number, handler in before.items():
                signal.signal(number, handler)
        return not self.stopping and not self.given_up

    def _note(self, number: int, _: object) -> None:
        if self.signals and number != signal.SIGHUP:  # of which a closing terminal may send two
            raise KeyboardInterrupt
        self.signals.append(number)

    def _round(self) -> bool:
        """Look after what runs, start what can be; True when there is nothing left to do."""
        if self.signals and not self.stopping:
            self.stopping = True
            for attempt in self.running:
                attempt.process.terminate()
            self.say(f"{signal.Signals(self.signals[0]).name}: each training writes a checkpoint; again: at once")
        try:
            for attempt in list(self.running):
                self._look_after(attempt)
            for trial in self.ledger.expire({a.trial._trial_id for a in self.running}, self.pause):
                self.say(f"{trial.user_attrs['label']}: its owner {trial.user_attrs['owner']} is lost")
            attempts = self.ledger.attempts()
            over = self.stopping or not self._start_some(attempts)
            self._status(attempts)
            self.reached = time.monotonic()
        except Exception as error:
            if not is_of_storage(error):
                raise
            silent = time.monotonic() - self.reached
            if silent > self.ledger.lease / 2:
                raise StudyError(
                    f"ledger {self.ledger.where}: no answer for {silent:.0f} s ({first_line(error)}). The trainings "
                    "were stopped; what is finished stays, and the same command goes on from the last checkpoints"
                ) from error
            self.say(f"ledger {self.ledger.where}: {first_line(error)}; trying again")
            return False
        return over and not self.running

    def _start_some(self, attempts: dict[str, list[FrozenTrial]]) -> bool:
        """Fill the free workers; False when every cell is done or given up."""
        owners = {key: live(trials)[0] for key, trials in attempts.items() if live(trials)}
        is_complete = {key for key, owner in owners.items() if owner.state == TrialState.COMPLETE}
        lacking = [cell for cell in self.study.cells if cell.key in is_complete and not self.study.done(cell)]
        self._wait_for_results(lacking)
        now = time.monotonic()
        self.busy = {key: since for key, since in self.busy.items() if now - since < self.ledger.lease}
        left = [cell for cell in self.study.cells if cell.key not in is_complete | self.given_up]
        places = set(range(self.machine.workers)) - {attempt.place for attempt in self.running}
        for cell in left:
            if not places or cell.key in owners or cell.key in self.busy:
                continue
            free = shutil.disk_usage(self.study.folder).free
            if free < LEAST_FREE:
                raise StudyError(f"{self.study.folder}: the disk is full; the same command goes on once there is room")
            trial = self.ledger.claim(cell)
            if trial is None:
                continue
            result = cell.result()
            if result is not None and self.study.done(cell):
                self.ledger.finish(trial, score_of(result))
                self.say(f"{cell.label}: was finished before, {outcome(result)}")
            else:
                self._start(cell, trial, places.pop())
        return bool(left or lacking)

    def _wait_for_results(self, lacking: list[Cell]) -> None:
        """A network disk may show a result later than the ledger does, but not by more than a lease."""
        self.lacking = (self.lacking or time.monotonic()) if lacking else 0.0
        if lacking and time.monotonic() - self.lacking > self.ledger.lease:
            raise StudyError(
                f"{self.ledger.where} says that {lacking[0].label} is finished, but {lacking[0].folder} has no result: "
                "is --output the same folder for all who work on it? (Without this ledger it is trained again.)"
            )

    def _start(self, cell: Cell, trial: FrozenTrial, place: int) -> None:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_text(cell.folder / "config.yaml", cell.config.to_yaml())
        for path in (*cell.folder.glob("nonfinite_step_*.json"), cell.folder / "failed.txt"):
            path.unlink(missing_ok=True)  # what an earlier attempt had to say
        before = newest_checkpoint(cell)
        process = self.machine.train(cell.folder, place, cell.folder / "log.txt")
        self.running.append(_Attempt(cell, trial, place, process, before))
        self.say(f"{cell.label}: {'goes on' if before else 'starts'} (worker {place}, {cell.folder})")

    def _look_after(self, attempt: _Attempt) -> None:
        status = attempt.process.poll()
        if status is not None:
            self._ended(attempt, status)
        elif time.monotonic() - attempt.beaten > self.ledger.lease / 6:
            attempt.beats += 1
            if self.ledger.beat(attempt.trial, attempt.beats):
                attempt.beaten = time.monotonic()
            else:
                self._drop(attempt)
                self.say(f"{attempt.cell.label}: taken over by another; stopped here")

    def _ended(self, attempt: _Attempt, status: int) -> None:
        cell = attempt.cell
        trained = is_trained(cell)
        if status == 0 and trained and self.study.milliseconds and not attempt.timing and not self.stopping:
            kill(attempt.process)
            attempt.timing = True
            attempt.process = self.machine.time(cell.folder, attempt.place, cell.folder / "log.txt")
            return
        untimed = trained and self.study.milliseconds and not attempt.timing
        if not untimed and (status == 0 or not trained):  # killed after the evaluation, the last checkpoint may lack
            seconds = None if attempt.before else round(time.monotonic() - attempt.started, 1)
            result = write_result(cell, seconds, _milliseconds(cell) if attempt.timing else None)
            if result is not None:
                (cell.folder / "previous.pt").unlink(missing_ok=True)  # there is nothing left to resume
                self.ledger.finish(attempt.trial, score_of(result))
                self._drop(attempt)
                took = f" in {timedelta(seconds=round(seconds))}" if seconds else ""
                self.say(f"{cell.label}: {outcome(result)}{took}")
                return
        self._failed(attempt, status)

    def _failed(self, attempt: _Attempt, status: int) -> None:
        """The training ended before its end: say why, and give the cell up where that was once too often."""
        cell, log = attempt.cell, attempt.cell.folder / "log.txt"
        if self.stopping:
            why = "stopped"
        elif status == BUSY:
            why = "another process trains in this folder"
            self.busy[cell.key] = time.monotonic()
        elif status > 0:
            why = f"error: {last_words(log)}"
        else:
            why = f"killed by {signal.Signals(-status).name}" if status else "stopped by a signal"
            progressed = newest_checkpoint(cell) != attempt.before
            self.kills[cell.key] = 0 if progressed else self.kills[cell.key] + 1
        self.ledger.fail(attempt.trial, why)
        self._drop(attempt)
        self.say(f"{cell.label}: {why} ({log})")
        if len(self.ledger.errors(cell)) >= ERRORS:
            self._give_up(cell, f"{ERRORS} attempts failed, the last with {why}")
        elif self.kills[cell.key] >= KILLS:
            self._give_up(cell, f"killed {KILLS} times without reaching a checkpoint (too little memory?)")

    def _give_up(self, cell: Cell, why: str) -> None:
        self.given_up.add(cell.key)
        write_text(cell.folder / "failed.txt", why)
        self.say(f"{cell.label}: given up: {why}; the others go on")

    def _drop(self, attempt: _Attempt) -> None:
        kill(attempt.process)
        self.running.remove(attempt)

    def _status(self, attempts: dict[str, list[FrozenTrial]]) -> None:
        mine = {attempt.trial._trial_id for attempt in self.running}
        owners = [live(trials)[0] for trials in attempts.values() if live(trials)]
        others = [t for t in owners if t.state == TrialState.RUNNING and t._trial_id not in mine]
        if not self.running and others and not self.stopping:
            waiting = "; ".join(f"{t.user_attrs['label']} by {t.user_attrs['owner']}" for t in others)
            if waiting != self.waiting:
                self.waiting = waiting
                self.say(f"nothing left to start; waiting for {waiting}")
        if time.monotonic() - self.told < STATUS or not self.running:
            return
        self.told = time.monotonic()
        done = sum(self.study.done(cell) for cell in self.study.cells)
        at = "; ".join(f"{a.cell.label}: step {step_of(a.cell)}/{a.cell.config.train.steps}" for a in self.running)
        left = estimate(self.study, self.machine.workers)
        about = f", about {timedelta(seconds=round(left))} left" if left is not None else ""
        self.say(f"{done}/{len(self.study.cells)} done{about}; running: {at}")


def score_of(result: dict[str, Any]) -> float:
    """AP between 0 and 1; 0 for a training that diverged or data that has nothing to measure."""
    return float((result["metrics"] or {}).get("AP") or 0.0)


def _milliseconds(cell: Cell) -> float:
    metrics = json.loads((cell.folder / "metrics.json").read_text(encoding="utf-8"))
    return float(metrics["milliseconds"])
