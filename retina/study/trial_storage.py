"""Which process runs which cell of a study: trials in an Optuna storage, a journal file or a database.

A cell is run by a trial. One rule gives each cell one owner:

    The owner of a cell is the process of its trial with the lowest number that has not failed.

A process claims a cell in two steps. First it adds, in one operation, a RUNNING trial that holds the key of the cell.
Then it looks at all trials of the cell, and fails its own if a lower one has not failed. FAIL is final, so a cell never
has two owners, whichever process is killed at whatever time. (A sampler of Optuna would not do: its grid counts a
failed cell as visited, and it may give a cell to two processes.)

The owner increments a counter in its trial, the heartbeat. Any process that sees a counter unchanged for the lease of
its trial fails that trial, and the cell is free again. Each process measures this time with its own clock, and does not
count the time in which it was stopped itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from retina.config_file import PATHS_OF_DATA
from retina.study.cells import LEDGER, Cell, Study, StudyError


class _Journal(JournalFileBackend):
    """Optuna's journal file. A last line that a full disk cut short is removed, because Optuna could not read it."""

    def __init__(self, path: Path) -> None:
        # The lock is a symbolic link to the file. A relative path would make it a broken link, and Optuna would never
        # see that its owner is dead.
        self.path, self.lock = path, JournalFileSymlinkLock(str(path.resolve()))
        super().__init__(str(path), self.lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.lock.acquire()  # while no other process writes
        try:
            with self.path.open("r+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read(1) not in (b"", b"\n"):
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        finally:
            self.lock.release()
        super().append_logs(logs)


class TrialStorage:
    """The trials of a study. Every method may raise what the storage raises, see `is_storage_error`."""

    def __init__(self, study: Study, url: str | None, lease: float) -> None:
        """Open or create the storage; `url` None is the file ledger.jsonl in the folder of the study.

        Raises StudyError if it cannot be reached, or if it was created with another content of the study file.
        """
        self.study, self.lease = study, lease
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        parsed = _parse_url(url) if url else None
        self.location = parsed.render_as_string(hide_password=True) if parsed else str(study.folder / LEDGER)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        for tries_left in (2, 1, 0):
            try:
                study.folder.mkdir(parents=True, exist_ok=True)
                self.storage = _open_storage(parsed, Path(self.location), lease)
                self.optuna_study = optuna.create_study(
                    storage=self.storage, study_name=study.name, direction="maximize", load_if_exists=True
                )
                break
            except Exception as error:  # every database driver has its own errors, and may not be installed
                if not tries_left:
                    raise StudyError(f"storage {self.location}: cannot be reached: {first_line(error)}") from error
                time.sleep(1)  # where two processes create the tables at the same time, one of them fails
        stored_summary = self.optuna_study.user_attrs.get("summary")
        if stored_summary is None:
            self.optuna_study.set_user_attr("summary", study.summary())
        else:
            _check_unchanged(study, stored_summary)
        self.first_trial_number = len(self.optuna_study.get_trials(deepcopy=False))  # earlier errors do not count
        params = [_trial_params(cell) for cell in study.cells]
        self._distributions: dict[str, BaseDistribution] = {
            key: CategoricalDistribution(list(dict.fromkeys(p[key] for p in params))) for key in params[0]
        }
        self._silent_seconds: dict[int, tuple[int, float]] = {}  # trial id: (heartbeat, seconds unchanged)
        self._last_check = time.monotonic()

    def trials_by_cell(self) -> dict[str, list[FrozenTrial]]:
        """The trials of each cell by its key, in the order of their numbers."""
        trials_by_cell: dict[str, list[FrozenTrial]] = {cell.key: [] for cell in self.study.cells}
        for trial in sorted(self.optuna_study.get_trials(deepcopy=False), key=lambda trial: trial.number):
            trials_by_cell.setdefault(trial.user_attrs["cell"], []).append(trial)
        return trials_by_cell

    def claim(self, cell: Cell) -> FrozenTrial | None:
        """A new RUNNING trial that owns the cell, or None if another trial owns it."""
        if not_failed(self.trials_by_cell()[cell.key]):
            return None
        token = uuid.uuid4().hex
        self.optuna_study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=_trial_params(cell),
                distributions=self._distributions,
                user_attrs={
                    "cell": cell.key,
                    "label": cell.label,
                    "owner": self.owner,
                    "token": token,
                    "beat": 0,
                    "lease": self.lease,
                },
            )
        )
        trials = self.trials_by_cell()[cell.key]
        own_trial = next(trial for trial in trials if trial.user_attrs["token"] == token)
        if not_failed(trials)[0].number == own_trial.number:
            return own_trial
        self.fail(own_trial, "withdrawn: another trial was first")
        return None

    def heartbeat(self, trial: FrozenTrial, count: int) -> bool:
        """Store the counter; False if the trial is no longer RUNNING, so that another process may own the cell."""
        try:
            self.storage.set_trial_user_attr(trial._trial_id, "beat", count)
        except UpdateFinishedTrialError:
            return False
        return True

    def complete(self, trial: FrozenTrial, ap: float) -> None:
        """Set the trial to COMPLETE with its AP between 0 and 1; a trial that has ended stays as it is."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.optuna_study.tell(trial.number, ap, skip_if_finished=True)

    def fail(self, trial: FrozenTrial, reason: str) -> None:
        """Set the trial to FAIL; a trial that has ended stays as it is."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial._trial_id, "ended", reason)
            self.optuna_study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def fail_expired(self, own_trials: set[int], poll_interval: float) -> list[FrozenTrial]:
        """Fail the RUNNING trials whose heartbeat did not change for their lease, and return them.

        Args:
            own_trials: ids of the trials of this process, which are not checked.
            poll_interval: seconds between two calls.
        """
        now = time.monotonic()
        elapsed = min(now - self._last_check, 2 * poll_interval)  # less than the clock's if this process was stopped
        self._last_check = now
        expired, silent_seconds = [], {}
        for trials in self.trials_by_cell().values():
            for trial in trials:
                if trial.state != TrialState.RUNNING or trial._trial_id in own_trials:
                    continue
                last_heartbeat, seconds = self._silent_seconds.get(trial._trial_id, (-1, 0.0))
                heartbeat = trial.user_attrs["beat"]
                seconds = seconds + elapsed if heartbeat == last_heartbeat else 0.0
                silent_seconds[trial._trial_id] = (heartbeat, seconds)
                if seconds > trial.user_attrs["lease"]:
                    self.fail(trial, f"lost: no heartbeat for {trial.user_attrs['lease']:g} s")
                    expired.append(trial)
        self._silent_seconds = silent_seconds
        return expired

    def errors(self, cell: Cell) -> list[str]:
        """The errors of the trials of the cell since this storage was opened."""
        trials = [trial for trial in self.trials_by_cell()[cell.key] if trial.number >= self.first_trial_number]
        return [e for trial in trials if (e := trial.user_attrs.get("ended", "")).startswith("error")]


def _trial_params(cell: Cell) -> dict[str, str]:
    """A cell as parameters of an Optuna trial. They are JSON, because Optuna takes no lists."""
    return {key: json.dumps(value) for key, value in cell.settings.items()} | {"seed": json.dumps(cell.seed)}


def not_failed(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that are not FAIL; the first of them owns the cell."""
    return [trial for trial in trials if trial.state != TrialState.FAIL]


def _parse_url(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        raise StudyError(
            "--storage: expected a URL such as postgresql://user@host/database, mysql+pymysql://user@host/database, "
            "redis://host:6379/0 or sqlite:///file.db"
        ) from None


def check_same_study(study: Study, url: str | None) -> None:
    """Raise StudyError if the study was started with another content. One that was never started is not created."""
    parsed = _parse_url(url) if url else None
    if parsed is None and not (study.folder / LEDGER).exists():
        return
    try:
        stored = optuna.load_study(
            study_name=study.name, storage=_open_storage(parsed, study.folder / LEDGER, lease=60)
        )
    except KeyError:
        return
    except Exception as error:  # as in TrialStorage
        raise StudyError(f"storage of {study.name}: cannot be reached: {first_line(error)}") from error
    if (summary := stored.user_attrs.get("summary")) is not None:
        _check_unchanged(study, summary)


def _open_storage(url: URL | None, path: Path, lease: float) -> BaseStorage:
    if url is None:
        return JournalStorage(_Journal(path))
    # A request to a silent server ends within half a lease, so that the loop can stop its runs in time.
    timeout = max(1, int(lease / 4))
    if url.drivername.startswith("redis"):
        url = url.update_query_dict({"socket_timeout": str(timeout)})
        return JournalStorage(JournalRedisBackend(url.render_as_string(hide_password=False)))
    connect_args: dict[str, Any] = {}
    if url.get_backend_name() == "postgresql":
        limit = f"-c statement_timeout={timeout}s -c idle_in_transaction_session_timeout={timeout}s"
        connect_args = {"connect_timeout": max(2, timeout), "tcp_user_timeout": 1000 * timeout, "options": limit}
    elif url.get_backend_name() == "mysql":
        connect_args = {"connect_timeout": timeout, "read_timeout": timeout, "write_timeout": timeout}
    engine_kwargs = {"pool_pre_ping": True, "connect_args": connect_args}
    return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)


def is_storage_error(error: Exception) -> bool:
    """Whether the storage failed, for example a full disk or a server that is gone."""
    is_known = isinstance(error, OSError | StorageInternalError | SQLAlchemyError)
    return is_known or type(error).__module__.startswith("redis.")  # redis may not be installed


def _check_unchanged(study: Study, stored_summary: dict[str, Any]) -> None:
    summary = study.summary()
    if stored_summary == summary:
        return
    changes = [
        f"{key} was {stored_summary['shared'].get(key)}, is {summary['shared'].get(key)}"
        for key in sorted(stored_summary["shared"].keys() | summary["shared"].keys())
        if stored_summary["shared"].get(key) != summary["shared"].get(key)
    ]
    stored_labels, labels = list(stored_summary["cells"].values()), list(summary["cells"].values())
    for word, ours, others in (("new", labels, stored_labels), ("gone", stored_labels, labels)):
        if different := [label for label in ours if label not in others]:
            examples = "; ".join(different[:3]) + ", ..." * (len(different) > 3)
            changes.append(f"{len(different)} cells are {word} ({examples})")
    if not changes:
        changes = ["the annotation files or the version of the program changed"]
    advice = "Save the changed study under another name: cells that are finished are found there too, and not run again"
    if any(stored_summary["shared"].get(key) != summary["shared"].get(key) for key in PATHS_OF_DATA):
        advice = "The paths of the data are part of each cell: use the same on all machines, for example a link"
    raise StudyError(
        f"{study.file} is not what the study {study.name} was started with: {'; '.join(changes)}. Nothing was changed. "
        f"{advice}"
    )


def first_line(error: BaseException) -> str:
    if isinstance(error, StorageInternalError):  # Optuna's own text takes every error for one of the data
        error = error.__cause__ or error
    return (str(error).strip() or type(error).__name__).splitlines()[0]
