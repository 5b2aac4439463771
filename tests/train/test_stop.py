"""Runs that are stopped and resumed, and folders that are in use. test_resume.py kills runs at random times."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from train_helpers import settings, stop_after, weights

from retina.config import Config
from retina.model import RetinaNet, checkpoint
from retina.model.retinanet import Outputs
from retina.train import loop
from retina.train.errors import RunError, RunFolderError
from retina.train.loop import _catch_stop_signals, train

pytestmark = pytest.mark.slow


def test_a_used_folder_is_refused_and_resume_needs_the_same_settings(tiny: Config, tiny_yaml: Path) -> None:
    tiny.run_dir.mkdir()
    (tiny.run_dir / "notes.txt").write_text("notes")
    with pytest.raises(RunError, match=r"not empty; --resume"):
        train(tiny)
    assert (tiny.run_dir / "notes.txt").read_text() == "notes"
    train(tiny, resume=True)  # no checkpoint: starts at step 0
    before = weights(tiny.run_dir)
    with pytest.raises(RunError, match=r"train\.lr was 0\.01, is 0\.02"):
        train(settings(tiny_yaml, tiny.run_dir, "train.lr=0.02"), resume=True)
    train(settings(tiny_yaml, tiny.run_dir, "data.workers=1"), resume=True)  # finished already: nothing changes
    assert weights(tiny.run_dir) == before


def test_weights_of_another_program_are_not_replaced(tiny: Config) -> None:
    tiny.run_dir.mkdir()
    (tiny.run_dir / "best.pt").write_text("of the user")
    with pytest.raises(RunFolderError, match=r"has best\.pt, but no config\.yaml and no checkpoint of this program"):
        train(tiny, resume=True)
    assert [path.name for path in tiny.run_dir.iterdir()] == ["best.pt"]


def test_a_folder_in_which_another_process_trains_is_refused(tiny: Config, finished_run: Path) -> None:
    shutil.copytree(finished_run, tiny.run_dir)
    before = {path: path.read_bytes() for path in tiny.run_dir.iterdir()}
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, 2); print('has', flush=True); input()"
    command = [sys.executable, "-c", code, str(tiny.run_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"has\n"
        owner = (finished_run / ".lock").read_text()  # the last one that wrote its name there
        with pytest.raises(RunFolderError, match=rf"another process is training here.*: {re.escape(owner)}$"):
            train(tiny, resume=True)
        other.kill()
    assert {path: path.read_bytes() for path in tiny.run_dir.iterdir()} == before
    train(tiny, resume=True)


def test_a_stopped_run_with_repeat_factor_sampling_resumes_exactly(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second epoch: 22 images give 33 samples, which are 8 steps."""
    flags = ["data.sampling=repeat_factor", "data.repeat_threshold=1", "train.steps=11", "train.eval_every=0"]
    whole, stopped = (settings(tiny_yaml, tmp_path / name, *flags) for name in ("whole", "stopped"))
    train(whole)
    expected = "sampling: repeat_factor, threshold 1: 33 samples per epoch instead of 22; most repeated class: "
    assert capsys.readouterr().out.count(expected) == 1
    with stop_after(9):
        train(stopped)
    train(stopped, resume=True)
    assert weights(stopped.run_dir) == weights(whole.run_dir)
    assert (stopped.run_dir / "metrics.csv").read_bytes() == (whole.run_dir / "metrics.csv").read_bytes()
    with pytest.raises(RunError, match=r"data\.sampling was repeat_factor, is uniform"):
        train(settings(tiny_yaml, stopped.run_dir, *flags[1:]), resume=True)


def test_a_stopped_run_with_random_layers_resumes_exactly(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a network with dropout or stochastic depth. Without them the random numbers of torch change nothing."""

    class WithDropout(RetinaNet):
        def forward(self, images: Tensor) -> Outputs:
            return super().forward(F.dropout(images, 0.2, self.training))

    monkeypatch.setattr("retina.train.start.RetinaNet", WithDropout)
    whole, stopped = (settings(tiny_yaml, tmp_path / name) for name in ("whole", "stopped"))
    train(whole)
    with stop_after(3):
        train(stopped)
    train(stopped, resume=True)
    assert weights(stopped.run_dir) == weights(whole.run_dir)
    assert (stopped.run_dir / "metrics.csv").read_bytes() == (whole.run_dir / "metrics.csv").read_bytes()


def test_a_signal_that_comes_twice_at_once_is_one_request() -> None:
    """Slurm sends it to every process of a job, and torchrun and ablate.py pass it on."""
    with _catch_stop_signals(1) as received:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
    assert received == [signal.SIGTERM] * 3 + [signal.SIGUSR1]
    code = (
        "import os, signal, time; from retina.train import loop; loop.REPEAT_SECONDS = 0.05\n"
        "with loop._catch_stop_signals(0):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM, "a second request ends the run at once"
    assert done.stderr.count(b"stopping after this step") == 1


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with _catch_stop_signals(0) as received:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_tee_does_not_end_the_run(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("retina.train.logbook.tqdm.write", broken)
    assert train(tiny)["step"] == 6


def test_resume_skips_a_damaged_checkpoint(tiny: Config, finished_run: Path) -> None:
    shutil.copytree(finished_run, tiny.run_dir)
    (tiny.run_dir / "last.pt").write_bytes((finished_run / "last.pt").read_bytes()[:1000])
    train(tiny, resume=True)
    assert weights(tiny.run_dir) == weights(finished_run)
    assert (tiny.run_dir / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_cleanly(
    tiny_yaml: Path, tmp_path: Path, finished_run: Path, number: signal.Signals
) -> None:
    config = settings(tiny_yaml, tmp_path / "stopped", "train.checkpoint_every=1000")
    step_function = loop.train_step

    def train_step(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if args[6] == 2:
            os.kill(os.getpid(), number)
        return step_function(*args, **kwargs)

    before = signal.signal(number, signal.default_int_handler)  # a shell that starts pytest with & ignores SIGINT
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train_step", train_step)
            train(config)
    finally:
        signal.signal(number, before)
    stopped_at = checkpoint.load(config.run_dir / checkpoint.LAST)["step"]
    assert 3 <= stopped_at < 6
    train(config, resume=True)
    assert weights(config.run_dir) == weights(finished_run)


def test_a_stop_before_an_evaluation_changes_nothing(tiny: Config, finished_run: Path) -> None:
    with stop_after(3):  # when an evaluation is due
        train(tiny)
    assert json.loads((tiny.run_dir / "eval.json").read_text()) == []
    train(tiny, resume=True)
    assert (tiny.run_dir / "eval.json").read_text() == (finished_run / "eval.json").read_text()
    assert weights(tiny.run_dir) == weights(finished_run)


@pytest.mark.parametrize("norm", ["frozen", "frozen_stats"])
def test_a_stopped_run_from_pretrained_weights_resumes_exactly(tiny_yaml: Path, tmp_path: Path, norm: str) -> None:
    """The statistics of the weights stay, before and after an evaluation and in a resumed run."""
    pretrained = settings(tiny_yaml, tmp_path / "pretrained", "model.norm=batch", "train.ema=0", "train.eval_every=0")
    train(pretrained)
    source = pretrained.run_dir / checkpoint.LAST
    flags = [f"model.weights={source}", f"model.norm={norm}", "model.frozen_stages=1"]
    whole, stopped = (settings(tiny_yaml, tmp_path / name, *flags) for name in ("whole", "stopped"))
    train(whole)
    with stop_after(2):  # before the first evaluation, which puts the network into evaluation mode and back
        train(stopped)
    train(stopped, resume=True)
    assert weights(stopped.run_dir) == weights(whole.run_dir)
    before, after = (checkpoint.load(path)["model"] for path in (source, whole.run_dir / checkpoint.LAST))
    statistics = [key for key in after if key.endswith(("running_mean", "running_var"))]
    assert statistics and all(torch.equal(before[key], after[key]) for key in statistics)
    assert not torch.equal(before["cls_logits.weight"], after["cls_logits.weight"])


def test_a_signal_to_the_whole_process_group_stops_cleanly(tiny_yaml: Path, tmp_path: Path) -> None:
    """torchrun, Slurm and `timeout` signal the whole group. The loader's workers must ignore the signal."""
    tool = Path(__file__).parents[2] / "tools/train.py"
    flags = ["train.steps=2000", "data.workers=2", "train.eval_every=0", f"output_dir={tmp_path}/run"]
    process = subprocess.Popen(
        [sys.executable, tool, tiny_yaml, *flags], start_new_session=True, stdout=subprocess.PIPE
    )
    metrics = tmp_path / "run/metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 0 and "stopped by a signal" in output
    assert checkpoint.load(tmp_path / "run" / checkpoint.LAST)["step"] >= 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
def test_a_full_disk_ends_the_command_with_its_reason(tiny: Config, tiny_yaml: Path, finished_run: Path) -> None:
    """/dev/full is a full disk of the kernel. test_disk_faults.py has the other kinds of faults, at each call."""
    with stop_after(2):
        train(tiny)
    (tiny.run_dir / ".last.pt.tmp").symlink_to("/dev/full")
    tool = Path(__file__).parents[2] / "tools/train.py"
    command = [sys.executable, tool, tiny_yaml, "--resume", f"output_dir={tiny.run_dir}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"error: run folder {tiny.run_dir}: No space left on device (last.pt)\n"
        "After the repair, --resume continues after step 2.\n"
    )
    train(tiny, resume=True)
    assert weights(tiny.run_dir) == weights(finished_run)
    assert (tiny.run_dir / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()
