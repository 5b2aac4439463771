"""The ledger and the driver, with trainings that only pretend. Real ones are killed in test_ablate_kill.py."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import FrozenTrial, TrialState

from retina.config_file import load_config
from retina.study import loop, outcome, trial_storage
from retina.study.cells import Study, StudyError
from retina.study.estimate import check_disk_space
from retina.study.launch import Machine
from retina.study.loop import Runner
from retina.study.outcome import error_line, is_trained
from retina.study.report import write_report
from retina.study.study_file import load_study
from retina.study.trial_storage import TrialStorage
from retina.train.loop import train

TOOL = Path(__file__).parents[2] / "tools/ablate.py"
STUDIES = Path(__file__).parents[2] / "configs/ablations"
FAKE = """
import json, os, re, signal, sys, time
from pathlib import Path
folder, plan = Path(sys.argv[1]).parent, Path(__file__).with_name("plan.json")
gamma = re.search(r"gamma: (\\S+)", (folder / "config.yaml").read_text())[1]
with (folder / "attempts").open("a") as file:
    file.write("x")
acts = json.loads(plan.read_text()).get(gamma, ["finish"])
act = acts[min((folder / "attempts").stat().st_size, len(acts)) - 1]
print("fake training", act, flush=True)
if act == "short":
    time.sleep(1)
if act in ("finish", "short"):
    numbers = {"AP": float(gamma) / 10, "per_class": {}}
    (folder / "eval.json").write_text(json.dumps([{"step": 6, **numbers}]))
elif act == "error":
    print("error: the disk is on fire")
    sys.exit(1)
elif act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif act == "diverge":
    (folder / "nonfinite_step_4.json").write_text(json.dumps({"step": 4, "image_ids": []}))
    sys.exit(1)
elif act == "busy":
    sys.exit(75)
elif act == "half":
    (folder / "eval.json").write_text("[]")
    sys.exit(0)
elif act == "late":
    (folder / "eval.json").write_text(json.dumps([{"step": 6, "AP": 0.5, "per_class": {}}]))
    os.kill(os.getpid(), signal.SIGKILL)
elif act == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
elif act == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(60)
"""


FAKE_EVAL = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1]).parent
assert sys.argv[2:] == ["--time", "--end-with-parent"]
if not (folder / "timed").exists():
    (folder / "timed").touch()
    sys.exit("error: out of memory")
(folder / "metrics.json").write_text(json.dumps({"milliseconds": 12.5}))
"""


@pytest.fixture
def make(tiny_yaml: Path, tmp_path: Path) -> Callable[..., Study]:
    """A study of a cell for each gamma, and beside it trainings that do what plan.json says for their gamma."""
    (tmp_path / "train.py").write_text(FAKE)

    (tmp_path / "eval.py").write_text(FAKE_EVAL)

    def study(gammas: list[float], name: str = "study", extra: str = "", **plan: list[str]) -> Study:
        (tmp_path / "plan.json").write_text(json.dumps({key.removeprefix("g"): acts for key, acts in plan.items()}))
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"base: {tiny_yaml}\naxes: {{loss.gamma: {gammas}}}\n{extra}")
        return load_study(file, output=tmp_path / "out")

    return study


def runner(study: Study, lease: float = 10, workers: int = 2, url: str | None = None) -> Runner:
    said: list[str] = []
    storage = TrialStorage(study, url, lease)
    run = Runner(study, storage, Machine(workers, 1, [], study.file.parent), said.append)
    run.pause = 0.02
    run.said = said  # type: ignore[attr-defined]
    return run


def states(study: Study, url: str | None = None) -> dict[str, list[str]]:
    trials_by_cell = TrialStorage(study, url, 10).trials_by_cell()
    return {cell.label: [trial.state.name for trial in trials_by_cell[cell.key]] for cell in study.cells}


def tries(study: Study) -> list[int]:
    return [(cell.folder / "attempts").stat().st_size for cell in study.cells]


def test_each_cell_is_trained_once_in_this_study_and_in_another(make: Callable[..., Study]) -> None:
    study = make([0, 1, 2])
    assert runner(study).run()
    assert list(states(study).values()) == [["COMPLETE"]] * 3 and tries(study) == [1, 1, 1]
    assert [cell.result()["metrics"]["AP"] for cell in study.cells] == [0.0, 0.1, 0.2]  # type: ignore[index]
    other = make([2, 1, 3], "other")
    run = runner(other)
    assert run.run() and tries(other) == [1, 1, 1]
    assert "gamma 2, seed 0: was finished before, AP 20.0" in run.said  # type: ignore[attr-defined]
    assert list(states(other).values()) == [["COMPLETE"]] * 3
    assert runner(study).run() and list(states(study).values()) == [["COMPLETE"]] * 3


def test_errors_are_retried_then_reported_and_stop_nobody(make: Callable[..., Study]) -> None:
    study = make([0, 1, 2], **{"g0.0": ["error"], "g1.0": ["error", "error", "finish"]})
    run = runner(study)
    assert not run.run()
    assert list(states(study).values()) == [["FAIL"] * 3, ["FAIL", "FAIL", "COMPLETE"], ["COMPLETE"]]
    assert study.cells[0].failure() == "3 attempts failed, the last with error: the disk is on fire"
    assert run.given_up == {study.cells[0].key} and study.cells[1].failure() is None
    (study.file.parent / "plan.json").write_text("{}")  # mended; the same command tries again
    assert runner(study).run() and next(iter(states(study).values())) == ["FAIL"] * 3 + ["COMPLETE"]
    assert study.cells[0].failure() is None


def test_kills_go_on_for_longer_than_errors_but_not_for_ever(make: Callable[..., Study]) -> None:
    study = make([0, 1], **{"g0.0": ["kill"] * 5 + ["finish"], "g1.0": ["kill"]})
    run = runner(study)
    assert not run.run()
    assert tries(study) == [6, loop.MAX_KILLS] and "too little memory" in str(study.cells[1].failure())


def test_a_loss_that_is_not_finite_is_a_result(make: Callable[..., Study]) -> None:
    study = make([0], **{"g0.0": ["diverge"]})
    assert runner(study).run() and tries(study) == [1]
    result = study.cells[0].result()
    assert result is not None and result["diverged"] == 4 and result["metrics"] is None


def test_a_study_that_wants_milliseconds_times_what_is_trained(make: Callable[..., Study]) -> None:
    study = make([0, 1])
    assert runner(study).run()
    timed = make([0, 1, 2], "timed", "milliseconds: true")
    run = runner(timed)
    assert run.run() and all("error: out of memory" in e for c in timed.cells for e in run.trial_storage.errors(c))
    assert list(states(timed).values()) == [["FAIL", "COMPLETE"]] * 3, "the clock of each fails once"
    for cell in timed.cells:
        result = cell.result()
        assert result is not None and result["milliseconds"] == 12.5 and timed.done(cell)
    assert runner(make([0, 1])).run() and tries(study) == [3, 3], "not again where nobody asks for the time"


def test_a_signal_stops_the_trainings_and_the_same_command_goes_on(make: Callable[..., Study]) -> None:
    study = make([0, 1, 2], **{"g1.0": ["wait", "finish"]})
    run = runner(study)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert not run.run()
    assert states(study)["gamma 1, seed 0"] == ["FAIL"]
    assert "gamma 1, seed 0: stopped" in " ".join(run.said)  # type: ignore[attr-defined]
    assert runner(study).run() and states(study)["gamma 1, seed 0"] == ["FAIL", "COMPLETE"]


def test_results_that_are_elsewhere_are_missed(make: Callable[..., Study]) -> None:
    """As on a machine whose --output is another folder than that of the machine that trained."""
    study = make([0, 1])
    assert runner(study).run()
    result = study.cells[0].folder / "result.json"
    text = result.read_text()
    result.unlink()
    threading.Timer(0.5, result.write_text, [text]).start()
    assert runner(study).run() and tries(study) == [1, 1], "a network disk may be late"
    result.unlink()
    with pytest.raises(StudyError, match=r"gamma 0, seed 0 is finished, but .* has no result: is --output the same"):
        runner(study, lease=1).run()


def test_a_second_signal_ends_at_once_and_gives_the_cells_back(make: Callable[..., Study]) -> None:
    study = make([0], **{"g0.0": ["deaf", "finish"]})
    run = runner(study, lease=1000)
    for seconds in (1.5, 2.0):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.running[0].process.poll() == -9 and list(states(study).values()) == [["FAIL"]]
    assert runner(study).run(), "without waiting for a lease"


def test_nohup_stays_in_force(make: Callable[..., Study]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        study = make([0], **{"g0.0": ["short"]})
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGHUP)).start()
        assert runner(study).run()
    finally:
        signal.signal(signal.SIGHUP, before)


URLS = pytest.mark.parametrize("url", [None, "sqlite:///{}/ledger.db"], ids=["journal", "sqlite"])


@URLS
def test_of_two_that_claim_at_once_the_first_has_the_cell(make: Callable[..., Study], url: str | None) -> None:
    check_race(make([0, 1]), url and url.format(make([0]).file.parent))


def check_race(study: Study, url: str | None) -> None:
    """One looks, the other claims, the one enters its attempt: it must see that it is second."""
    cell = study.cells[0]
    slow, quick = TrialStorage(study, url, 10), TrialStorage(study, url, 10)
    enter, owner = slow.optuna.add_trial, None

    def late(trial: FrozenTrial) -> None:
        nonlocal owner
        owner = quick.claim(cell)
        enter(trial)

    slow.optuna.add_trial = late  # type: ignore[method-assign]
    assert slow.claim(cell) is None and owner is not None
    assert quick.claim(cell) is None and slow.heartbeat(owner, 1)
    trials = quick.trials_by_cell()[cell.key]
    assert [trial.state.name for trial in trials] == ["RUNNING", "FAIL"]
    assert trials[1].user_attrs["ended"].startswith("withdrawn")
    quick.fail(owner, "error: x")
    assert not slow.heartbeat(owner, 2)
    again = quick.claim(cell)
    assert again is not None and again.number == 2
    quick.complete(again, 0.5)
    quick.complete(again, 0.7)  # once is enough
    assert quick.claim(cell) is None and quick.trials_by_cell()[cell.key][2].value == 0.5


@URLS
def test_silence_loses_a_cell_and_a_heartbeat_keeps_it(make: Callable[..., Study], url: str | None) -> None:
    study = make([0, 1])
    url = url and url.format(study.file.parent)
    owner, watcher = TrialStorage(study, url, 0.4), TrialStorage(study, url, 10)  # what counts is the owner's lease
    dead, alive = (owner.claim(cell) for cell in study.cells)
    assert dead and alive
    expired: list[str] = []
    for count in range(30):
        assert owner.heartbeat(alive, count)
        expired += [trial.user_attrs["label"] for trial in watcher.fail_expired(set(), 0.03)]
        time.sleep(0.03)
    assert expired == ["gamma 0, seed 0"]
    assert not owner.heartbeat(dead, 99), "its owner learns of it"
    assert list(states(study, url).values()) == [["FAIL"], ["RUNNING"]]
    assert watcher.claim(study.cells[0]) is not None


def test_a_watcher_that_stood_still_itself_expires_nobody(make: Callable[..., Study]) -> None:
    study = make([0])
    owner, watcher = TrialStorage(study, None, 0.4), TrialStorage(study, None, 0.4)
    assert owner.claim(study.cells[0])
    watcher.fail_expired(set(), 0.03)
    time.sleep(0.6)
    assert watcher.fail_expired(set(), 0.03) == [] and watcher.fail_expired(set(), 0.03) == []


def test_who_lost_its_cell_stops_its_training(make: Callable[..., Study]) -> None:
    study = make([0], **{"g0.0": ["wait", "finish"]})
    run = runner(study, lease=1)
    other = TrialStorage(study, None, 10)

    def take() -> None:
        (trial,) = other.trials_by_cell()[study.cells[0].key]
        other.fail(trial, "lost")

    threading.Timer(1, take).start()
    assert run.run() and tries(study) == [2]
    assert "gamma 0, seed 0: taken over by another; stopped here" in run.said  # type: ignore[attr-defined]


def test_a_storage_that_goes_away_stops_the_trainings_in_time(make: Callable[..., Study]) -> None:
    """In time: before anybody who still reaches the ledger may take the cell for lost."""
    study = make([0], **{"g0.0": ["wait"]})
    run, other = runner(study, lease=2), TrialStorage(study, None, 2)
    lost: list[FrozenTrial] = []

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def watch() -> None:
        run.trial_storage.trials_by_cell = run.trial_storage.heartbeat = broken  # type: ignore[method-assign,assignment]
        while run.running[0].process.poll() is None:
            lost.extend(other.fail_expired(set(), 0.05))
            time.sleep(0.05)

    watcher = threading.Timer(0.5, watch)
    watcher.start()
    with pytest.raises(StudyError, match=r"no answer for .*No space left on device.*the same command goes on"):
        run.run()
    watcher.join()
    assert lost == [] and run.running[0].process.poll() is not None


def written(study: Study) -> list[tuple[Path, int]]:
    """All files and when they were last written, but for the ledger, in which a visit leaves a line."""
    files = (path for path in study.folder.parent.rglob("*") if path.is_file() and path.name != "ledger.jsonl")
    return sorted((path, path.stat().st_mtime_ns) for path in files)


def test_a_changed_study_is_refused_and_nothing_lost(make: Callable[..., Study]) -> None:
    study = make([0, 1])
    assert runner(study).run()
    before = written(study)
    changed = make([0, 3])
    with pytest.raises(StudyError) as error:
        TrialStorage(changed, None, 10)
    for part in ["1 cells are new (gamma 3, seed 0)", "1 cells are gone (gamma 1, seed 0)", "under another name"]:
        assert part in str(error.value)
    steps = load_study(study.file.with_name("study.yaml"), overrides=["train.steps=9"], output=study.folder.parent)
    with pytest.raises(StudyError, match=r"train.steps was 6, is 9"):
        TrialStorage(steps, None, 10)
    assert written(study) == before


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:secret@127.0.0.1:1/x", r"postgresql://me:\*\*\*@127\.0\.0\.1:1/x: cannot be reached: .+"),
        ("redis://127.0.0.1:1/0", r"redis://127\.0\.0\.1:1/0: cannot be reached: .+"),
        ("nosuch://x", r"nosuch://x: cannot be reached: .*nosuch"),
        ("nonsense:secret", r"--storage: expected a URL such as postgresql://"),
    ],
)
def test_a_storage_out_of_reach_is_named_without_its_password(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, url: str, says: str
) -> None:
    monkeypatch.setattr(trial_storage.time, "sleep", lambda _: None)
    with pytest.raises(StudyError, match=says) as error:
        TrialStorage(make([0]), url, 10)
    assert "secret" not in str(error.value)


def test_a_line_cut_short_in_the_journal_costs_nothing(make: Callable[..., Study]) -> None:
    study = make([0, 1])
    storage = TrialStorage(study, None, 10)
    assert storage.claim(study.cells[0])
    with Path(storage.where).open("a") as file:
        file.write('{"op_code":4,"worker')
    assert storage.claim(study.cells[1])
    assert list(states(study).values()) == [["RUNNING"], ["RUNNING"]]


def test_a_lock_of_a_dead_process_is_seen(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its link must lead to the file from wherever one looks; Optuna would wait for ever at one that leads nowhere."""
    monkeypatch.chdir(tmp_path)
    study = make([0])
    relative = load_study(study.file, output=Path("out"))
    assert not relative.folder.is_absolute()
    book = TrialStorage(relative, None, 10)
    backend = book.storage._backend  # type: ignore[attr-defined]
    backend.lock.acquire()  # and dies
    assert Path("out/study-tiny/ledger.jsonl.lock").exists(), "a link that leads nowhere does not exist"
    backend.lock.grace_period = 1
    assert book.claim(relative.cells[0])


def test_a_folder_in_which_somebody_trains_is_left_alone_for_a_while(make: Callable[..., Study]) -> None:
    study = make([0], **{"g0.0": ["busy"] * 4 + ["finish"]})
    run = runner(study, lease=1)
    assert run.run() and tries(study) == [5] and not run.trial_storage.errors(study.cells[0])


def test_what_an_earlier_attempt_left_does_not_speak_for_a_later_one(make: Callable[..., Study]) -> None:
    study = make([0], **{"g0.0": ["half", "finish"]})
    study.cells[0].folder.mkdir(parents=True)
    (study.cells[0].folder / "nonfinite_step_2.json").write_text('{"step": 2}')  # whose driver died before it said so
    assert runner(study).run()
    result = study.cells[0].result()
    assert result is not None and result["diverged"] is None and tries(study) == [2]


def test_killed_after_its_last_evaluation_is_not_yet_finished(make: Callable[..., Study]) -> None:
    """Its last checkpoint may not be written."""
    study = make([0], **{"g0.0": ["late", "finish"]})
    assert runner(study).run() and tries(study) == [2]
    assert list(states(study).values()) == [["FAIL", "COMPLETE"]]


def test_last_words_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    for text, said in [
        ("step 1\nerror: no such file\n", "no such file"),
        (
            "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nbye\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("ValueError: this\nx.ChildFailedError: \n=====\n", "ValueError: this"),
        ("step 1\nstep 2\n", "step 2"),
        ("", "no output"),
    ]:
        log.write_text(text)
        assert error_line(log) == said
    assert error_line(tmp_path / "none.txt") == "no output"


def test_a_full_disk_is_said_before(make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    study = make([0, 1])
    study.folder.mkdir(parents=True)
    check_disk_space(study, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**31))
    check_disk_space(study, 2**28)
    with pytest.raises(StudyError, match=r"2\.0 GiB are free, .* about 6\.0; free some"):
        check_disk_space(study, 2**30)


def test_each_worker_has_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert Machine.detect(None, 1, Path()).workers == 4 and Machine.detect(None, 2, Path()).workers == 2
    machine = Machine.detect(3, 2, Path())
    assert [machine.environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4,5", "6,7", "4,5"]
    with pytest.raises(StudyError, match=r"devices: 8 for a cell, but this machine shows 4 GPUs"):
        Machine.detect(None, 8, Path())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert Machine.detect(3, 2, Path()).environment(0)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Machine.detect(3, 2, Path()).environment(0)["OMP_NUM_THREADS"] == "5", "what the user says counts"


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=200)


def test_dry_run_lists_the_cells_and_measures_the_time(make: Callable[..., Study]) -> None:
    study = make([0, 2])
    done = tool(study.file, "--dry-run", "--output", study.folder.parent, "train.steps=1000")
    assert done.returncode == 0, done.stderr
    assert "gamma 0, seed 0" in done.stdout and "gamma 2, seed 0" in done.stdout
    assert "a cell of 1000 steps" in done.stdout and "for 2 cells" in done.stdout
    assert [path.name for path in study.folder.parent.rglob("*")] == [study.folder.name], "nothing is left behind"


def test_what_cannot_train_is_said_before_any_training(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make([0])
    output = ["--output", tmp_path / "out"]
    for arguments, says in [
        (["data.val_images=nowhere"], "data.val_images: no nowhere"),
        (["train.steps=1000", "model.norm=frozen"], "does not train: model.norm=frozen keeps the statistics"),
        (["--workers", "0"], "--workers 0: expected 1 or more"),
        (["loss.gama=1"], "did you mean loss.gamma?"),
        (["seed=3"], "seed is not a setting of a cell"),
        (["loss.gamma=3"], "study.yaml varies loss.gamma"),
        (["--storage", "sqlite:///x.db", "train.precision=auto"], "with --storage give train.precision"),
    ]:
        done = tool(study.file, *arguments, *output)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out/cells").exists()


def test_a_copied_study_on_ones_own_data(tiny_yaml: Path, tmp_path: Path) -> None:
    """Real trainings, from the copied file to the report."""
    text = (TOOL.parents[1] / "configs/ablations/gamma_alpha.yaml").read_text()
    mine = text.replace("base: base/shapes.yaml", f"base: {tiny_yaml}")
    mine = mine.replace("[0, 0.1, 0.2, 0.5, 1, 2, 5]", "[0, 2]").replace(
        "[0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999]", "[0.25]"
    )
    (tmp_path / "mine.yaml").write_text(mine)
    done = tool(tmp_path / "mine.yaml", "--output", tmp_path / "out", "train.steps=3", "--workers", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out/mine-tiny"
    for name in ("report.html", "report.md", "results.csv", "trainings.csv"):
        assert str(folder / name) in done.stdout and (folder / name).is_file()
    lines = done.stdout.splitlines()
    assert any(line.split()[:3] == ["2", "0.25", "1/1"] and "34.0" in line for line in lines), "beside the paper's 34.0"
    csv = (folder / "trainings.csv").read_text().splitlines()
    assert len(csv) == 3 and all(",finished," in line for line in csv[1:])
    again = tool(tmp_path / "mine.yaml", "--output", tmp_path / "out", "train.steps=3", "--report")
    assert again.returncode == 0 and again.stdout.splitlines()[-3:] == lines[-3:]


def test_a_cell_on_two_processes(tiny_yaml: Path, tmp_path: Path) -> None:
    """Real ones, under torchrun: the probe, and the cell."""
    (tmp_path / "two.yaml").write_text(f"base: {tiny_yaml}\naxes: {{loss.gamma: [2]}}\ndevices: 2\n")
    output = ["--output", tmp_path / "out"]
    dry = tool(tmp_path / "two.yaml", "--dry-run", "train.steps=1000", *output)
    assert dry.returncode == 0 and "a cell of 1000 steps" in dry.stdout, dry.stderr
    done = tool(tmp_path / "two.yaml", "train.steps=3", *output)
    assert done.returncode == 0 and ": AP " in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_trains(path: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    """A step of its last cell, as the base has it but for the data; and its report."""
    tiny = load_config(tiny_yaml).data
    data = [
        f"data.{name}={getattr(tiny, name)}" for name in tiny.model_dump() if name.split("_")[0] in ("train", "val")
    ]
    small = ["train.batch_size=2", "train.precision=fp32", "data.zoom=[1,1]"]
    study = load_study(path, overrides=[*data, *small], output=tmp_path)
    cell = study.cells[-1]
    one_step = cell.config.model_copy(update={"train": cell.config.train.model_copy(update={"steps": 1})})
    cell = dataclasses.replace(cell, config=one_step)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(cell.config.to_yaml())
    metrics = train(load_config(cell.folder / "config.yaml"), resume=True)
    assert metrics["step"] == 1 and is_trained(cell) and not study.done(cell)
    outcome.write_result(cell, None, 1.0)
    write_report(study)
    assert study.done(cell) and (study.folder / "report.html").is_file()


def test_an_attempt_is_a_trial_that_optunas_dashboard_can_show(make: Callable[..., Study]) -> None:
    study = make([0.5])
    storage = TrialStorage(study, None, 10)
    assert storage.claim(study.cells[0])
    (trial,) = storage.optuna.get_trials()
    assert trial.params == {"loss.gamma": "0.5", "seed": "0"} and trial.state == TrialState.RUNNING
