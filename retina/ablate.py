"""A grid of trainings as a resumable study, by any number of processes on any number of machines.

Optuna's storage is the ledger: a trial is one attempt at a cell. One rule keeps everything apart:

    A cell belongs to its attempt with the lowest number that has not failed.

An attempt enters the ledger in one piece, RUNNING and with its cell's key. Only then its maker looks: where a lower one
has not failed, the later one withdraws. Failing is final, so a cell never has two owners, whoever is killed when.

The owner trains in a process of its own and moves a counter, the heartbeat. Who sees a counter stand still for the
length of a lease fails that attempt, and the cell goes on from its last checkpoint under another. The watching is timed
by the observer's clock, and the observer's own pauses do not count. An owner that cannot reach the ledger for half a
lease stops its trainings itself. torch is never imported here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from retina.files import write_text
from retina.study import Cell, Study, StudyError

LEASE = 60.0  # seconds of silence after which an owner counts as lost
ERRORS = 3  # attempts that end with an error, until a cell is given up
KILLS = 10  # attempts in a row that are killed before they reach a checkpoint: too little memory, most likely
STATUS = 60.0  # seconds between two lines about what is running
PROBE_STEPS = 4


# ---- the ledger ---------------------------------------------------------------------------------------------


class _Journal(JournalFileBackend):
    """Optuna's journal, which a line that a full disk cut short would make unreadable: such an end is taken off."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, JournalFileSymlinkLock(str(path))
        super().__init__(str(path), self.lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.lock.acquire()  # nobody is writing now
        try:
            with self.path.open("r+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read(1) not in (b"", b"\n"):
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        finally:
            self.lock.release()
        super().append_logs(logs)


class Ledger:
    """Attempts at the cells of a study, in an Optuna storage; every method may raise what the storage raises."""

    def __init__(self, study: Study, url: str | None, lease: float) -> None:
        """Opens or begins it. Raises StudyError: out of reach, or begun with another content of the study file."""
        self.study, self.lease = study, lease
        self.me = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.where = _without_password(url) if url else str(study.folder / "ledger.jsonl")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        for tries_left in (2, 1, 0):
            try:
                self.storage = _open(url, Path(self.where))
                self.optuna = optuna.create_study(
                    storage=self.storage, study_name=study.name, direction="maximize", load_if_exists=True
                )
                break
            except Exception as error:  # every driver has its own kinds, and none can be imported here
                if not tries_left:
                    raise StudyError(f"storage {self.where}: cannot be reached: {_first_line(error)}") from error
                time.sleep(1)  # two processes that make the tables at the same time: one of them fails
        before = self.optuna.user_attrs.get("summary")
        if before is None:
            self.optuna.set_user_attr("summary", study.summary())
        else:
            _check_unchanged(study, before)
        self.begun = len(self.optuna.get_trials(deepcopy=False))  # errors before it are forgiven
        params = [_params(cell) for cell in study.cells]
        self._choices: dict[str, BaseDistribution] = {
            key: CategoricalDistribution(list(dict.fromkeys(p[key] for p in params))) for key in params[0]
        }
        self._silent: dict[int, tuple[int, float]] = {}  # trial id: (beat, seconds it has stood still)
        self._looked = time.monotonic()

    def attempts(self) -> dict[str, list[FrozenTrial]]:
        """By cell key, in the order of their numbers."""
        found: dict[str, list[FrozenTrial]] = {cell.key: [] for cell in self.study.cells}
        for trial in sorted(self.optuna.get_trials(deepcopy=False), key=lambda trial: trial.number):
            found.setdefault(trial.user_attrs["cell"], []).append(trial)
        return found

    def claim(self, cell: Cell) -> FrozenTrial | None:
        """A new attempt that owns the cell, or None where another does."""
        if _live(self.attempts()[cell.key]):
            return None
        token = uuid.uuid4().hex
        self.optuna.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=_params(cell),
                distributions=self._choices,
                user_attrs={"cell": cell.key, "label": cell.label, "owner": self.me, "token": token, "beat": 0},
            )
        )
        trials = self.attempts()[cell.key]
        mine = next(trial for trial in trials if trial.user_attrs["token"] == token)
        if _live(trials)[0].number == mine.number:
            return mine
        self.fail(mine, "withdrawn: another was first")
        return None

    def beat(self, trial: FrozenTrial, count: int) -> bool:
        """Move the counter; False where the attempt is no longer running, so that the cell may be another's."""
        try:
            self.storage.set_trial_user_attr(trial._trial_id, "beat", count)
        except UpdateFinishedTrialError:
            return False
        return True

    def finish(self, trial: FrozenTrial, ap: float) -> None:
        """The attempt is COMPLETE; nothing where it has ended already."""
        self.optuna.tell(trial.number, ap, skip_if_finished=True)

    def fail(self, trial: FrozenTrial, why: str) -> None:
        """The attempt is FAIL for the reason given; nothing where it has ended already."""
        try:
            self.storage.set_trial_user_attr(trial._trial_id, "ended", why)
        except UpdateFinishedTrialError:
            return
        self.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def expire(self, mine: set[int], pause: float) -> list[FrozenTrial]:
        """Fail the running attempts that stood still for a lease; returns them. To be called every `pause` seconds."""
        now = time.monotonic()
        watched = min(now - self._looked, 2 * pause)  # what passed while this process itself stood still tells nothing
        self._looked = now
        cells, expired, silent = {cell.key: cell for cell in self.study.cells}, [], {}
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial._trial_id in mine:
                continue
            beat, still = self._silent.get(trial._trial_id, (-1, 0.0))
            still = still + watched if beat == trial.user_attrs["beat"] else 0.0
            silent[trial._trial_id] = (trial.user_attrs["beat"], still)
            if still > self.lease:
                cell = cells[trial.user_attrs["cell"]]
                result = cell.result()
                if result is not None and self.study.done(cell):  # lost between its last file and its last word
                    self.finish(trial, score_of(result))
                else:
                    self.fail(trial, f"lost: no sign of life for {self.lease:g} s")
                    expired.append(trial)
        self._silent = silent
        return expired

    def errors(self, cell: Cell) -> list[str]:
        """How attempts at the cell went wrong since this ledger was opened."""
        trials = [trial for trial in self.attempts()[cell.key] if trial.number >= self.begun]
        return [e for trial in trials if (e := trial.user_attrs.get("ended", "")).startswith("error")]


def _params(cell: Cell) -> dict[str, str]:
    """A cell as parameters of an Optuna trial, which can be no lists."""
    return {key: json.dumps(value) for key, value in cell.settings.items()} | {"seed": json.dumps(cell.seed)}


def _live(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state != TrialState.FAIL]


def _open(url: str | None, path: Path) -> BaseStorage:
    if url is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(_Journal(path))
    if url.startswith("redis"):
        return JournalStorage(JournalRedisBackend(url))
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


def _is_of_storage(error: Exception) -> bool:
    """A full disk, a server that is gone."""
    known = isinstance(error, OSError | StorageInternalError | SQLAlchemyError)
    return known or type(error).__module__.startswith("redis.")  # which need not be installed


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        raise StudyError(
            f"--storage {url}: expected a URL such as postgresql://user@host/database, mysql+pymysql://..., "
            "redis://host:6379/0 or sqlite:///file.db"
        ) from None


def _check_unchanged(study: Study, before: dict[str, Any]) -> None:
    now = study.summary()
    if before == now:
        return
    said = [
        f"{key} was {before['shared'].get(key)}, is {now['shared'].get(key)}"
        for key in sorted(before["shared"].keys() | now["shared"].keys())
        if before["shared"].get(key) != now["shared"].get(key)
    ]
    labels_before, labels_now = (list(summary["cells"].values()) for summary in (before, now))
    for word, these, others in (("new", labels_now, labels_before), ("gone", labels_before, labels_now)):
        if different := [label for label in these if label not in others]:
            said.append(
                f"{len(different)} cells are {word} ({'; '.join(different[:3])}{', ...' * (len(different) > 3)})"
            )
    if not said:
        said = ["the annotation files are others, or this is another version of the program"]
    raise StudyError(
        f"{study.file} is not what the study {study.name} was started with: {'; '.join(said)}. Nothing was touched. "
        "Save the changed study under another name: cells that are finished are found there too, and not trained again"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- results ------------------------------------------------------------------------------------------------


def score_of(result: dict[str, Any]) -> float:
    """AP between 0 and 1; 0 for a training that diverged or data that has nothing to measure."""
    return float((result["metrics"] or {}).get("AP") or 0.0)


def write_result(cell: Cell, seconds: float | None, milliseconds: float | None) -> dict[str, Any] | None:
    """result.json of a training that has ended by itself, finished or diverged; None where there is more to do."""
    evaluations, broken = cell.folder / "eval.json", sorted(cell.folder.glob("nonfinite_step_*.json"))
    entries = json.loads(evaluations.read_text(encoding="utf-8")) if evaluations.exists() else []
    steps = cell.config.train.steps
    if entries and entries[-1]["step"] == steps:
        metrics, step, diverged = {k: v for k, v in entries[-1].items() if k != "step"}, steps, None
    elif broken:
        metrics, step = None, json.loads(broken[0].read_text(encoding="utf-8"))["step"]
        diverged = step
    else:
        return None
    result = {
        "settings": cell.settings,
        "seed": cell.seed,
        "step": step,
        "metrics": metrics,
        "diverged": diverged,
        "milliseconds": milliseconds,
        "seconds": seconds,
    }
    write_text(cell.folder / "result.json", json.dumps(result, indent=1))
    return result


# ---- trainings ----------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Machine:
    """What this machine gives to the trainings."""

    workers: int
    devices: int  # processes of a training
    gpus: list[str]  # as CUDA_VISIBLE_DEVICES names them

    @classmethod
    def find(cls, workers: int | None, devices: int) -> Machine:
        """One worker for each GPU (or group of `devices` GPUs), one on a machine without; StudyError for too few."""
        gpus = _gpus()
        if gpus and len(gpus) < devices:
            raise StudyError(
                f"devices: {devices} for a cell, but this machine shows {len(gpus)} GPUs ({', '.join(gpus)})"
            )
        return cls(workers or max(1, len(gpus) // devices), devices, gpus)

    def environment(self, place: int) -> dict[str, str]:
        """For the training of a worker: its GPUs, or its share of the cores."""
        values = dict(os.environ)
        if self.gpus:
            groups = len(self.gpus) // self.devices
            first = place % groups * self.devices
            values["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.devices])
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            values.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.workers * self.devices))))
        return values

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        place = f"GPU {', '.join(self.gpus)}" if self.gpus else "CPU"
        return f"{workers}, {place}"


def _gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


class Runner:
    """Trains the cells of a study on this machine until all are done; others may do the same at the same time."""

    def __init__(
        self,
        study: Study,
        ledger: Ledger,
        machine: Machine,
        tools: Path,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`tools`: the folder of train.py and eval.py."""
        self.study, self.ledger, self.machine, self.tools = study, ledger, machine, tools
        self.say = say or (lambda text: print(f"{datetime.now():%H:%M:%S}  {text}", flush=True))
        self.pause = min(1.0, ledger.lease / 10)
        self.running: list[_Attempt] = []
        self.given_up: dict[str, str] = {}
        self.kills: dict[str, int] = {}
        self.signals: list[int] = []
        self.stopping = False
        self.reached = time.monotonic()  # when the ledger last answered
        self.told = 0.0
        self.waiting = ""

    def run(self) -> bool:
        """True when every cell is done, False where some were given up or a signal came. Raises StudyError."""
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            while not self._round():
                time.sleep(self.pause)
        finally:
            for attempt in self.running:
                _kill(attempt.process)
            for number, handler in before.items():
                signal.signal(number, handler)
        lacking = [c for c in self.study.cells if not self.study.done(c) and c.key not in self.given_up]
        if lacking and not self.stopping:
            raise StudyError(
                f"{self.ledger.where} says that {lacking[0].label} is finished, but {lacking[0].folder} has no result: "
                "is --output the same folder for all who work on this study?"
            )
        return not self.stopping and not self.given_up

    def _note(self, number: int, _: object) -> None:
        self.signals.append(number)
        if len(self.signals) > 1:
            raise KeyboardInterrupt

    def _round(self) -> bool:
        """Look after what runs, start what can be; True when there is nothing left to do."""
        if self.signals and not self.stopping:
            self.stopping = True
            self.say(f"{signal.Signals(self.signals[0]).name}: each training writes a checkpoint; again: at once")
            for attempt in self.running:
                attempt.process.terminate()
        try:
            for attempt in list(self.running):
                self._look_after(attempt)
            for trial in self.ledger.expire({a.trial._trial_id for a in self.running}, self.pause):
                self.say(f"{trial.user_attrs['label']}: its owner {trial.user_attrs['owner']} is lost")
            over = self.stopping or not self._start_some()
            self._status()
            self.reached = time.monotonic()
        except Exception as error:
            if not _is_of_storage(error):
                raise
            silent = time.monotonic() - self.reached
            if silent > self.ledger.lease / 2:
                raise StudyError(
                    f"storage {self.ledger.where}: no answer for {silent:.0f} s ({_first_line(error)}). The trainings "
                    "were stopped; what is finished stays, and the same command goes on from the last checkpoints"
                ) from error
            self.say(f"storage {self.ledger.where}: {_first_line(error)}; trying again")
            return False
        return over and not self.running

    def _start_some(self) -> bool:
        """Fill the free workers; False when every cell is done or given up."""
        attempts = self.ledger.attempts()
        open_cells = []
        for cell in self.study.cells:
            live = _live(attempts[cell.key])
            done = bool(live) and live[0].state == TrialState.COMPLETE
            if not done and cell.key not in self.given_up:
                open_cells.append(cell)
        places = set(range(self.machine.workers)) - {attempt.place for attempt in self.running}
        free = [cell for cell in open_cells if not _live(attempts[cell.key])]
        while free and places:
            cell = free.pop(0)
            trial = self.ledger.claim(cell)
            if trial is None:
                continue
            result = cell.result()
            if result is not None and self.study.done(cell):
                self.ledger.finish(trial, score_of(result))
                self.say(f"{cell.label}: was finished before, {_outcome(result)}")
            else:
                self._start(cell, trial, places.pop())
        return bool(open_cells)

    def _start(self, cell: Cell, trial: FrozenTrial, place: int) -> None:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_text(cell.folder / "config.yaml", cell.config.to_yaml())
        checkpoint = _newest(cell)
        process = _training(cell.folder, self.machine, place, self.tools, cell.folder / "log.txt")
        self.running.append(_Attempt(cell, trial, place, process, checkpoint))
        self.say(f"{cell.label}: {'goes on' if checkpoint else 'starts'} (worker {place}, {cell.folder})")

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
        if status == 0 and self.study.milliseconds and not attempt.timing and not self.stopping and _finished(cell):
            attempt.timing = True
            _kill(attempt.process)
            command = [sys.executable, str(self.tools / "eval.py"), str(cell.folder / "config.yaml"), "--time"]
            attempt.process = _process(command, self.machine.environment(attempt.place), cell.folder / "log.txt")
            return
        seconds = None if attempt.before else round(time.monotonic() - attempt.started, 1)
        untimed = attempt.timing and status != 0
        milliseconds = _milliseconds(cell) if attempt.timing and not untimed else None
        result = None if untimed else write_result(cell, seconds, milliseconds)
        if result is not None and self.study.done(cell):
            self.ledger.finish(attempt.trial, score_of(result))
            self._drop(attempt)
            self.say(f"{cell.label}: {_outcome(result)}{f' in {timedelta(seconds=round(seconds))}' if seconds else ''}")
            return
        log = cell.folder / "log.txt"
        if status == 0:
            why = "stopped by a signal"
        elif status < 0:
            why = f"killed by {signal.Signals(-status).name}"
        else:
            why = f"error: {_last_line(log)}"
        if status < 0 and not self.stopping:
            progressed = _newest(cell) != attempt.before
            self.kills[cell.key] = 0 if progressed else self.kills.get(cell.key, 0) + 1
        self.ledger.fail(attempt.trial, why)
        self._drop(attempt)
        self.say(f"{cell.label}: {why} ({log})")
        if len(self.ledger.errors(cell)) >= ERRORS:
            self.given_up[cell.key] = f"{ERRORS} attempts failed, the last with {why}"
        elif self.kills.get(cell.key, 0) >= KILLS:
            self.given_up[cell.key] = f"killed {KILLS} times without reaching a checkpoint (too little memory?)"
        if cell.key in self.given_up:
            self.say(f"{cell.label}: given up: {self.given_up[cell.key]}; the others go on")

    def _drop(self, attempt: _Attempt) -> None:
        _kill(attempt.process)
        self.running.remove(attempt)

    def _status(self) -> None:
        attempts = self.ledger.attempts()
        elsewhere = [
            trial
            for trials in attempts.values()
            for trial in _live(trials)[:1]
            if trial.state == TrialState.RUNNING and trial._trial_id not in {a.trial._trial_id for a in self.running}
        ]
        if not self.running and elsewhere and not self.stopping:
            waiting = "; ".join(f"{t.user_attrs['label']} by {t.user_attrs['owner']}" for t in elsewhere)
            if waiting != self.waiting:
                self.waiting = waiting
                self.say(
                    f"nothing left to start; waiting for {waiting} (lost after {self.ledger.lease:g} s of silence)"
                )
        if time.monotonic() - self.told < STATUS or not self.running:
            return
        self.told = time.monotonic()
        done = [cell for cell in self.study.cells if self.study.done(cell)]
        at = "; ".join(f"{a.cell.label}: step {_step(a.cell)}/{a.cell.config.train.steps}" for a in self.running)
        left = estimate(self.study, self.machine.workers)
        about = f", about {timedelta(seconds=round(left))} left" if left is not None else ""
        self.say(f"{len(done)}/{len(self.study.cells)} done{about}; running: {at}")


def _training(folder: Path, machine: Machine, place: int, tools: Path, log: Path | None) -> subprocess.Popen[bytes]:
    """train.py on the config.yaml of `folder`, as a user would start it."""
    command = [sys.executable]
    if machine.devices > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={machine.devices}"]
    command += [str(tools / "train.py"), str(folder / "config.yaml"), "--resume", "--end-with-parent"]
    return _process(command, machine.environment(place), log)


def _process(command: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    """Its standard input is a pipe that closes with this process, however that ends; its output goes to `log`."""
    output: IO[bytes] | int = log.open("ab") if log else subprocess.PIPE
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then decides
        )
    finally:
        if not isinstance(output, int):
            output.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started; waits until it is gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _newest(cell: Cell) -> int:
    """Tells checkpoints apart; 0 without one."""
    path = cell.folder / "last.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def _finished(cell: Cell) -> bool:
    path = cell.folder / "eval.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))[-1]["step"] == cell.config.train.steps


def _milliseconds(cell: Cell) -> float | None:
    metrics = json.loads((cell.folder / "metrics.json").read_text(encoding="utf-8"))
    value: float | None = metrics.get("milliseconds")
    return value


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "no output"


def _step(cell: Cell) -> int:
    path = cell.folder / "metrics.csv"
    rows = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    return int(float(rows[-1].split(",")[0])) if rows else 0


def _outcome(result: dict[str, Any]) -> str:
    if result["diverged"] is not None:
        return f"diverged at step {result['diverged']}"
    ap = result["metrics"]["AP"]
    return "no AP: nothing to measure" if ap is None else f"AP {100 * ap:.1f}"


# ---- before it starts ---------------------------------------------------------------------------------------


def estimate(study: Study, workers: int) -> float | None:
    """Seconds until all cells are done, from those that are; None while there is none."""
    times = [r["seconds"] for cell in study.cells if (r := cell.result()) is not None and r["seconds"] is not None]
    left = sum(not study.done(cell) for cell in study.cells)
    return sum(times) / len(times) * left / workers if times else None


def probe(study: Study, machine: Machine, tools: Path) -> tuple[float, int]:
    """Train a few steps of the first open cell in a folder that is removed: (seconds a step, bytes of a checkpoint).

    Raises StudyError with the training's own words where it cannot run.
    """
    config = next(cell.config for cell in study.cells if not study.done(cell))
    folder = study.folder / f"probe-{uuid.uuid4().hex[:8]}"
    train = config.train.model_copy(update={"log_every": 1, "eval_every": 0})
    folder.mkdir(parents=True)
    process = None
    try:
        config = config.model_copy(update={"output_dir": str(folder), "train": train})
        write_text(folder / "config.yaml", config.to_yaml())
        process = _training(folder, machine, 0, tools, None)
        assert process.stdout is not None
        said, steps = [], [0.0]
        for line in process.stdout:
            said.append(line.decode(errors="replace").strip())
            if re.match(r"step \d+/", said[-1]):
                steps = [*steps[-PROBE_STEPS:], time.monotonic()] if steps[0] else [time.monotonic()]
                if len(steps) > PROBE_STEPS:
                    break
        process.terminate()  # it writes a checkpoint
        process.stdout.read()
        process.wait()
        if process.returncode or len(steps) <= PROBE_STEPS:
            raise StudyError(f"a cell of {study.file} does not train: {(said or ['no output'])[-1]}")
        return (steps[-1] - steps[0]) / PROBE_STEPS, (folder / "last.pt").stat().st_size
    finally:
        if process is not None:
            _kill(process)
        shutil.rmtree(folder)


def check_space(study: Study, checkpoint_bytes: int) -> None:
    """StudyError where the disk has no room for the open cells: three checkpoints each."""
    needed = max(2**26, 3 * checkpoint_bytes * sum(not study.done(cell) for cell in study.cells))
    free = shutil.disk_usage(study.folder).free
    if free < needed:
        raise StudyError(
            f"{study.folder}: {free / 2**30:.1f} GiB are free, and the checkpoints of the open cells need about "
            f"{needed / 2**30:.1f}; free some, or give --output a folder on another disk"
        )
