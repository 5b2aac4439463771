"""Who trains which cell of a study: attempts in an Optuna storage, a journal file or a database.

One rule keeps everything apart:

    A cell belongs to its attempt with the lowest number that has not failed.

An attempt enters the ledger in one piece, as a RUNNING trial with its cell's key. Only then its maker looks: where a
lower one has not failed, the later one withdraws. Failing is final, so a cell never has two owners, whoever is killed
when. (A sampler of Optuna would not do: its grid counts a failed cell as visited, and may hand one out twice.)

An owner moves a counter, the heartbeat. Who sees a counter stand still for the length of its lease fails that attempt,
and the cell is free. The watching is timed by the observer's clock, and the observer's own pauses do not count.
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

from retina.study.cells import Cell, Study, StudyError


class _Journal(JournalFileBackend):
    """Optuna's journal, which a line that a full disk cut short would make unreadable: such an end is taken off."""

    def __init__(self, path: Path) -> None:
        # The lock is a symbolic link to the file: a relative one would point nowhere, and a dead owner's never be seen.
        self.path, self.lock = path, JournalFileSymlinkLock(str(path.resolve()))
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


class TrialStorage:
    """Every method may raise what the storage raises: see `is_storage_error`."""

    def __init__(self, study: Study, url: str | None, lease: float) -> None:
        """Opens or begins it. Raises StudyError: out of reach, or begun with another content of the study file."""
        self.study, self.lease = study, lease
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        parsed = _parse_url(url) if url else None
        self.where = parsed.render_as_string(hide_password=True) if parsed else str(study.folder / "ledger.jsonl")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        for tries_left in (2, 1, 0):
            try:
                study.folder.mkdir(parents=True, exist_ok=True)
                self.storage = _open_storage(parsed, Path(self.where), lease)
                self.optuna = optuna.create_study(
                    storage=self.storage, study_name=study.name, direction="maximize", load_if_exists=True
                )
                break
            except Exception as error:  # every driver has its own kinds, and none can be imported here
                if not tries_left:
                    raise StudyError(f"storage {self.where}: cannot be reached: {first_line(error)}") from error
                time.sleep(1)  # two processes that make the tables at the same time: one of them fails
        before = self.optuna.user_attrs.get("summary")
        if before is None:
            self.optuna.set_user_attr("summary", study.summary())
        else:
            _check_unchanged(study, before)
        self.first_trial_number = len(self.optuna.get_trials(deepcopy=False))  # errors before it are forgiven
        params = [_trial_params(cell) for cell in study.cells]
        self._distributions: dict[str, BaseDistribution] = {
            key: CategoricalDistribution(list(dict.fromkeys(p[key] for p in params))) for key in params[0]
        }
        self._silent_seconds: dict[int, tuple[int, float]] = {}  # trial id: (beat, seconds it has stood still)
        self._last_check = time.monotonic()

    def trials_by_cell(self) -> dict[str, list[FrozenTrial]]:
        """By cell key, in the order of their numbers."""
        found: dict[str, list[FrozenTrial]] = {cell.key: [] for cell in self.study.cells}
        for trial in sorted(self.optuna.get_trials(deepcopy=False), key=lambda trial: trial.number):
            found.setdefault(trial.user_attrs["cell"], []).append(trial)
        return found

    def claim(self, cell: Cell) -> FrozenTrial | None:
        """A new attempt that owns the cell, or None where another does."""
        if not_failed(self.trials_by_cell()[cell.key]):
            return None
        token = uuid.uuid4().hex
        self.optuna.add_trial(
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
        mine = next(trial for trial in trials if trial.user_attrs["token"] == token)
        if not_failed(trials)[0].number == mine.number:
            return mine
        self.fail(mine, "withdrawn: another was first")
        return None

    def heartbeat(self, trial: FrozenTrial, count: int) -> bool:
        """Move the counter; False where the attempt is no longer running, so that the cell may be another's."""
        try:
            self.storage.set_trial_user_attr(trial._trial_id, "beat", count)
        except UpdateFinishedTrialError:
            return False
        return True

    def complete(self, trial: FrozenTrial, ap: float) -> None:
        """The attempt is COMPLETE; nothing where it has ended already."""
        with contextlib.suppress(UpdateFinishedTrialError):  # another was quicker
            self.optuna.tell(trial.number, ap, skip_if_finished=True)

    def fail(self, trial: FrozenTrial, why: str) -> None:
        """The attempt is FAIL for the reason given; nothing where it has ended already."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial._trial_id, "ended", why)
            self.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def fail_expired(self, mine: set[int], pause: float) -> list[FrozenTrial]:
        """Fail the running attempts that stood still for their lease; returns them. To be called every `pause` seconds;
        `mine` are the trial ids that this process looks after itself."""
        now = time.monotonic()
        watched = min(
            now - self._last_check, 2 * pause
        )  # what passed while this process itself stood still tells nothing
        self._last_check = now
        expired, silent = [], {}
        for trials in self.trials_by_cell().values():
            for trial in trials:
                if trial.state != TrialState.RUNNING or trial._trial_id in mine:
                    continue
                heartbeat, still = self._silent_seconds.get(trial._trial_id, (-1, 0.0))
                still = still + watched if heartbeat == trial.user_attrs["beat"] else 0.0
                silent[trial._trial_id] = (trial.user_attrs["beat"], still)
                if still > trial.user_attrs["lease"]:
                    self.fail(trial, f"lost: no sign of life for {trial.user_attrs['lease']:g} s")
                    expired.append(trial)
        self._silent_seconds = silent
        return expired

    def errors(self, cell: Cell) -> list[str]:
        """How attempts at the cell went wrong since this ledger was opened."""
        trials = [trial for trial in self.trials_by_cell()[cell.key] if trial.number >= self.first_trial_number]
        return [e for trial in trials if (e := trial.user_attrs.get("ended", "")).startswith("error")]


def _trial_params(cell: Cell) -> dict[str, str]:
    """A cell as parameters of an Optuna trial, which can be no lists."""
    return {key: json.dumps(value) for key, value in cell.settings.items()} | {"seed": json.dumps(cell.seed)}


def not_failed(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that have not failed; the first of them owns the cell."""
    return [trial for trial in trials if trial.state != TrialState.FAIL]


def _parse_url(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        raise StudyError(
            "--storage: expected a URL such as postgresql://user@host/database, mysql+pymysql://user@host/database, "
            "redis://host:6379/0 or sqlite:///file.db"
        ) from None


def _open_storage(url: URL | None, path: Path, lease: float) -> BaseStorage:
    """A server that stays silent must not keep its asker from noticing: all waits end within half a lease."""
    if url is None:
        return JournalStorage(_Journal(path))
    patience = max(1, int(lease / 4))
    if url.drivername.startswith("redis"):
        url = url.update_query_dict({"socket_timeout": str(patience)})
        return JournalStorage(JournalRedisBackend(url.render_as_string(hide_password=False)))
    waits: dict[str, Any] = {}
    if url.get_backend_name() == "postgresql":
        limit = f"-c statement_timeout={patience}s -c idle_in_transaction_session_timeout={patience}s"
        waits = {"connect_timeout": max(2, patience), "tcp_user_timeout": 1000 * patience, "options": limit}
    elif url.get_backend_name() == "mysql":
        waits = {"connect_timeout": patience, "read_timeout": patience, "write_timeout": patience}
    engine = {"pool_pre_ping": True, "connect_args": waits}
    return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine)


def is_storage_error(error: Exception) -> bool:
    """A full disk, a server that is gone."""
    known = isinstance(error, OSError | StorageInternalError | SQLAlchemyError)
    return known or type(error).__module__.startswith("redis.")  # which need not be installed


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


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
