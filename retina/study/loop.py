"""The loop of a study: starts the runs of the open cells, watches them and records how they end. Imports no torch.

`study_file` reads the cells, `trial_storage` decides which process runs which cell, `launch` starts a run and `outcome`
reads how it ended. Any number of processes on any number of machines may run the same study. A process that gets no
answer from the storage for half a lease stops its runs, before another process takes over their cells.
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
from retina.command_line import EXIT_FOLDER_IN_USE, FOLDER_IN_USE
from retina.study.cells import Cell, Study, StudyError, code_digest
from retina.study.estimate import MIN_FREE_BYTES, count_steps
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

MAX_ERRORS = 3  # trials that may end with an error before a cell is given up
MAX_KILLS = 10  # trials in a row that may be killed before they write a checkpoint, most likely for too little memory
STATUS_INTERVAL = 60.0  # seconds between two status lines


@dataclass
class _RunningTrial:
    """A trial that this process owns, and the process of its run."""

    cell: Cell
    trial: FrozenTrial
    worker: int
    process: subprocess.Popen[bytes]
    checkpoint_at_start: int  # its checkpoint_time; 0 without a checkpoint
    start_time: float = field(default_factory=time.monotonic)
    heartbeat_count: int = 0
    last_heartbeat: float = field(default_factory=time.monotonic)
    code: str = field(default_factory=code_digest)  # this program runs for hours, and each run reads the files anew
    timing: bool = False  # training has ended, and the process measures the speed of the detector


def print_with_time(text: str) -> None:
    """Print a line with the time of day. A closed terminal does not stop a study."""
    with contextlib.suppress(OSError):
        print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


class Runner:
    """Runs the cells of a study on this machine until all are done. Other processes may do the same meanwhile."""

    def __init__(
        self, study: Study, trial_storage: TrialStorage, machine: Machine, log: Callable[[str], None] = print_with_time
    ) -> None:
        self.study, self.trial_storage, self.machine, self.log = study, trial_storage, machine, log
        self.poll_interval = min(1.0, trial_storage.lease / 10)  # seconds
        self.running: list[_RunningTrial] = []
        self.given_up: set[str] = set()  # keys of cells
        self.kill_counts: Counter[str] = Counter()  # by cell, since its last checkpoint
        self.busy_since: dict[str, float] = {}  # cells whose folder a process outside of the storage trains in
        self.results_missing_since = 0.0  # 0: every COMPLETE cell has its result
        self.signals: list[int] = []
        self.stopping = False
        self.last_answer = time.monotonic()  # of the storage
        self.start_time = time.monotonic()
        self.steps_at_start = count_steps(study)[0]
        self.last_status = 0.0
        self.last_waiting_for = ""

    def run(self) -> bool:
        """Run until nothing is left to do: True if every cell is done, False if some were given up or a signal came.

        Raises StudyError if the storage cannot be reached, KeyboardInterrupt at a second Ctrl-C or SIGTERM.
        """
        # A signal that is ignored stays ignored, as nohup wants it.
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        previous_handlers = {number: signal.signal(number, self._handle_signal) for number in numbers}
        try:
            while not self._poll():
                time.sleep(self.poll_interval)
        finally:
            for running in self.running:
                kill(running.process)
                try:
                    self.trial_storage.fail(running.trial, "stopped")
                except Exception as error:  # whatever the storage raises, the other runs must be stopped too
                    self.log(f"{running.cell.label}: stays reserved for one more lease: {first_line(error)}")
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
        return not self.stopping and not self.given_up

    def _handle_signal(self, number: int, _: object) -> None:
        if self.signals and number != signal.SIGHUP:  # a closing terminal may send SIGHUP twice
            raise KeyboardInterrupt
        self.signals.append(number)

    def _poll(self) -> bool:
        """Check the runs, release lost cells, start new runs; True when nothing is left to do."""
        if self.signals and not self.stopping:
            self._stop_runs()
        try:
            for running in list(self.running):
                self._check(running)
            self._fail_expired_trials()
            trials_by_cell = self.trial_storage.trials_by_cell()
            nothing_to_start = self.stopping or not self._start_open_cells(trials_by_cell)
            self._log_status(trials_by_cell)
            self.last_answer = time.monotonic()
        except Exception as error:
            if not is_storage_error(error):
                raise
            self._handle_storage_error(error)
            return False
        return nothing_to_start and not self.running

    def _stop_runs(self) -> None:
        self.stopping = True
        for running in self.running:
            running.process.terminate()
        name = signal.Signals(self.signals[0]).name
        self.log(f"{name}: each run writes a checkpoint and stops; a second signal stops them at once")

    def _fail_expired_trials(self) -> None:
        own_trials = {running.trial._trial_id for running in self.running}
        for trial in self.trial_storage.fail_expired(own_trials, self.poll_interval):
            self.log(f"{trial.user_attrs['label']}: its owner {trial.user_attrs['owner']} is lost")

    def _handle_storage_error(self, error: Exception) -> None:
        silent = time.monotonic() - self.last_answer
        if silent > self.trial_storage.lease / 2:
            raise StudyError(
                f"storage {self.trial_storage.location}: no answer for {silent:.0f} s ({first_line(error)}). The runs "
                "were stopped. Finished cells are kept, and the same command continues from the last checkpoints"
            ) from error
        self.log(f"storage {self.trial_storage.location}: {first_line(error)}; trying again")

    def _start_open_cells(self, trials_by_cell: dict[str, list[FrozenTrial]]) -> bool:
        """Start an open cell on each free worker; False when every cell is done or given up."""
        owners = {key: not_failed(trials)[0] for key, trials in trials_by_cell.items() if not_failed(trials)}
        complete = {key for key, trial in owners.items() if trial.state == TrialState.COMPLETE}
        without_result = [cell for cell in self.study.cells if cell.key in complete and not self.study.is_done(cell)]
        self._wait_for_results(without_result)
        now = time.monotonic()
        lease = self.trial_storage.lease
        self.busy_since = {key: since for key, since in self.busy_since.items() if now - since < lease}
        open_cells = [cell for cell in self.study.cells if cell.key not in complete | self.given_up]
        free_workers = set(range(self.machine.workers)) - {running.worker for running in self.running}
        for cell in open_cells:
            if not free_workers or cell.key in owners or cell.key in self.busy_since:
                continue
            if shutil.disk_usage(self.study.folder).free < MIN_FREE_BYTES:
                raise StudyError(f"{self.study.folder}: the disk is full; free some space and run the same command")
            trial = self.trial_storage.claim(cell)
            if trial is None:
                continue
            result = cell.result()
            if result is not None and self.study.is_done(cell):
                self.trial_storage.complete(trial, ap_of(result))
                self.log(f"{cell.label}: was finished before, {describe_result(result)}")
            else:
                self._start(cell, trial, free_workers.pop())
        return bool(open_cells or without_result)

    def _wait_for_results(self, without_result: list[Cell]) -> None:
        """A network disk may show a result later than the storage shows its trial. StudyError after a lease."""
        self.results_missing_since = (self.results_missing_since or time.monotonic()) if without_result else 0.0
        if without_result and time.monotonic() - self.results_missing_since > self.trial_storage.lease:
            raise StudyError(
                f"{self.trial_storage.location}: the trial of {without_result[0].label} is finished, but "
                f"{without_result[0].folder} has no result: is --output the same folder for all processes of the study "
                "on all machines? (With a new storage the cell is run again.)"
            )

    def _start(self, cell: Cell, trial: FrozenTrial, worker: int) -> None:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_text(cell.folder / "config.yaml", cell.config.to_yaml())
        for path in (*cell.folder.glob("nonfinite_step_*.json"), cell.folder / "failed.txt"):
            path.unlink(missing_ok=True)  # from an earlier trial
        checkpoint = checkpoint_time(cell)
        process = self.machine.start_training(cell.folder, worker, cell.folder / "log.txt")
        self.running.append(_RunningTrial(cell, trial, worker, process, checkpoint))
        self.log(f"{cell.label}: {'resumed' if checkpoint else 'started'} (worker {worker}, {cell.folder})")

    def _check(self, running: _RunningTrial) -> None:
        """Handle the end of the process, or move the heartbeat while it runs."""
        status = running.process.poll()
        if status is not None:
            self._handle_exit(running, status)
        elif time.monotonic() - running.last_heartbeat > self.trial_storage.lease / 6:
            running.heartbeat_count += 1
            if self.trial_storage.heartbeat(running.trial, running.heartbeat_count):
                running.last_heartbeat = time.monotonic()
            else:
                self._remove(running)
                self.log(f"{running.cell.label}: taken over by another process; stopped here")

    def _handle_exit(self, running: _RunningTrial, status: int) -> None:
        cell = running.cell
        trained = is_trained(cell)
        if status == 0 and trained and self.study.milliseconds and not running.timing and not self.stopping:
            kill(running.process)
            running.timing = True
            running.process = self.machine.start_timing(cell.folder, running.worker, cell.folder / "log.txt")
            return
        untimed = trained and self.study.milliseconds and not running.timing
        # A run that was killed after its last evaluation may lack its last checkpoint: it is resumed.
        if not untimed and (status == 0 or not trained):
            seconds = None if running.checkpoint_at_start else round(time.monotonic() - running.start_time, 1)
            result = write_result(cell, seconds, _read_milliseconds(cell) if running.timing else None, running.code)
            if result is not None:
                (cell.folder / "previous.pt").unlink(missing_ok=True)  # nothing will be resumed
                self.trial_storage.complete(running.trial, ap_of(result))
                self._remove(running)
                duration = f" in {timedelta(seconds=round(seconds))}" if seconds else ""
                self.log(f"{cell.label}: {describe_result(result)}{duration}")
                return
        self._handle_failure(running, status)

    def _handle_failure(self, running: _RunningTrial, status: int) -> None:
        """The run ended early: record why, and give the cell up after too many failures."""
        cell, log = running.cell, running.cell.folder / "log.txt"
        if self.stopping:
            reason = "stopped"
        elif status == EXIT_FOLDER_IN_USE or (status > 0 and FOLDER_IN_USE in error_line(log)):  # torchrun ends with 1
            reason = "another process trains in this folder"
            self.busy_since[cell.key] = time.monotonic()
        elif status > 0:
            reason = f"error: {error_line(log)}"
        else:
            reason = f"killed by {signal.Signals(-status).name}" if status else "stopped by a signal"
            progressed = checkpoint_time(cell) != running.checkpoint_at_start
            self.kill_counts[cell.key] = 0 if progressed else self.kill_counts[cell.key] + 1
        self.trial_storage.fail(running.trial, reason)
        self._remove(running)
        self.log(f"{cell.label}: {reason} ({log})")
        if len(self.trial_storage.errors(cell)) >= MAX_ERRORS:
            self._give_up(cell, f"{MAX_ERRORS} trials failed, the last with {reason}")
        elif self.kill_counts[cell.key] >= MAX_KILLS:
            self._give_up(cell, f"killed {MAX_KILLS} times without reaching a checkpoint (too little memory?)")

    def _give_up(self, cell: Cell, reason: str) -> None:
        self.given_up.add(cell.key)
        write_text(cell.folder / "failed.txt", reason)
        self.log(f"{cell.label}: given up: {reason}; the other cells continue")

    def _remove(self, running: _RunningTrial) -> None:
        kill(running.process)
        self.running.remove(running)

    def _log_status(self, trials_by_cell: dict[str, list[FrozenTrial]]) -> None:
        """Log which cells of other processes are waited for, and once per STATUS_INTERVAL the own progress."""
        own_trials = {running.trial._trial_id for running in self.running}
        owners = [not_failed(trials)[0] for trials in trials_by_cell.values() if not_failed(trials)]
        others = [t for t in owners if t.state == TrialState.RUNNING and t._trial_id not in own_trials]
        if not self.running and others and not self.stopping:
            waiting_for = "; ".join(f"{t.user_attrs['label']} by {t.user_attrs['owner']}" for t in others)
            if waiting_for != self.last_waiting_for:
                self.last_waiting_for = waiting_for
                self.log(f"nothing left to start; waiting for {waiting_for}")
        if time.monotonic() - self.last_status < STATUS_INTERVAL or not self.running:
            return
        self.last_status = time.monotonic()
        num_done = sum(self.study.is_done(cell) for cell in self.study.cells)
        progress = "; ".join(
            f"{r.cell.label}: step {last_logged_step(r.cell)}/{r.cell.config.train.steps}" for r in self.running
        )
        self.log(f"{num_done}/{len(self.study.cells)} done{self._time_left()}; running: {progress}")

    def _time_left(self) -> str:
        """At the pace since the start of this process, with all that others did meanwhile; empty before a step."""
        done, remaining = count_steps(self.study)
        own = done - self.steps_at_start
        if own <= 0:
            return ""
        seconds = (time.monotonic() - self.start_time) * remaining / own
        return f", about {timedelta(seconds=round(seconds))} left"


def ap_of(result: dict[str, Any]) -> float:
    """AP between 0 and 1; 0 for a run that diverged and for data with nothing to measure."""
    return float((result["metrics"] or {}).get("AP") or 0.0)


def _read_milliseconds(cell: Cell) -> float:
    metrics = json.loads((cell.folder / "metrics.json").read_text(encoding="utf-8"))
    return float(metrics["milliseconds"])
