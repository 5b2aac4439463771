"""What can be done with a run that failed: corrected, moved, or continued where it ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import run_main
from train_helpers import settings, stop_after, weights

from retina.config import Config
from retina.data.annotations import DataError
from retina.model import checkpoint
from retina.train import loop
from retina.train.errors import RunError
from retina.train.loop import train

pytestmark = pytest.mark.slow


def fail_with(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_an_evaluation_that_fails_costs_no_step(
    tiny: Config, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(loop, "_evaluate", fail_with(DataError("3.png: not readable")))
        train(tiny)
    saved = checkpoint.load(tiny.run_dir / checkpoint.LAST)
    assert (saved["step"], saved["evaluated"]) == (3, 0)
    train(tiny, resume=True)
    assert weights(tiny.run_dir) == weights(finished_run)
    assert (tiny.run_dir / "eval.json").read_bytes() == (finished_run / "eval.json").read_bytes()


def test_a_kill_after_an_evaluation_repeats_it_once(
    tiny: Config, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eval.json has the evaluation of step 3 when the process ends, and the checkpoint of step 3 does not know it."""
    log_step = loop.Logbook.log_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            loop.Logbook,
            "log_step",
            lambda log, step, *rest: fail_with(KeyboardInterrupt())() if step == 4 else log_step(log, step, *rest),
        )
        train(tiny)
    assert [entry["step"] for entry in json.loads((tiny.run_dir / "eval.json").read_text())] == [3]
    assert checkpoint.load(tiny.run_dir / checkpoint.LAST)["evaluated"] == 0
    train(tiny, resume=True)
    assert (tiny.run_dir / "eval.json").read_bytes() == (finished_run / "eval.json").read_bytes()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_failed_in_its_first_step_can_be_corrected(
    tiny: Config, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"out of memory: CUDA.*\n.*train\.accumulate=2"):
        patch.setattr(loop, "train_step", fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried ...")))
        train(tiny)
    assert (tiny.run_dir / "metrics.csv").exists()
    corrected = settings(tiny_yaml, tiny.run_dir, "train.batch_size=2", "train.steps=1", "train.warmup_steps=0")
    train(corrected, resume)
    with pytest.raises(RunError, match="is not empty; --resume continues its run"):
        train(corrected)


def test_a_config_of_the_user_is_not_replaced(tiny: Config) -> None:
    tiny.run_dir.mkdir()
    (tiny.run_dir / "config.yaml").write_text("# mine\n" + tiny.to_yaml())
    with pytest.raises(RunError, match="is not empty"):
        train(tiny)
    assert (tiny.run_dir / "config.yaml").read_text().startswith("# mine")


def test_other_validation_annotations_start_the_best_anew(
    tiny_yaml: Path, coco_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(coco_root / "val.json", tmp_path / "val.json")
    config = settings(tiny_yaml, tmp_path / "run", f"data.val_annotations={tmp_path}/val.json")
    with stop_after(4):
        train(config)
    tree = json.loads((tmp_path / "val.json").read_text())
    less = [entry | {"area": -1} for entry in tree["annotations"][:1]] + tree["annotations"][1:]  # not evaluated
    (tmp_path / "val.json").write_text(json.dumps(tree | {"annotations": less}))
    train(config, resume=True)
    output = capsys.readouterr().out
    assert "the validation annotations have changed since then" in output
    (change,) = json.loads((config.run_dir / "changes.json").read_text())
    assert (change["step"], change["key"]) == (4, "val_data")
    assert checkpoint.load(config.run_dir / checkpoint.BEST)["step"] == 6, "the first evaluation with the new ones"


def test_a_run_that_stopped_early_stays_at_its_end(tiny_yaml: Path, coco_root: Path, tmp_path: Path) -> None:
    """With other validation annotations, too. Its weights alone are left, so it could not go on."""
    shutil.copy(coco_root / "val.json", tmp_path / "val.json")
    flags = [f"data.val_annotations={tmp_path}/val.json", "train.eval_every=1", "train.early_stop=1", "train.lr=1e-9",
             "train.keep=weights", "train.steps=12"]  # fmt: skip
    config = settings(tiny_yaml, tmp_path / "run", *flags)
    train(config)
    ended = checkpoint.load(config.run_dir / checkpoint.LAST)
    assert ended["step"] < 12 and not ended["optimizer"]
    tree = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps(tree | {"annotations": tree["annotations"][1:]}))
    train(config, resume=True)
    assert checkpoint.load(config.run_dir / checkpoint.LAST)["step"] == ended["step"]
    shutil.copytree(coco_root / "val", tmp_path / "images")
    shutil.copy(coco_root / "val.json", tmp_path / "val.json")
    train(settings(tiny_yaml, tmp_path / "run", *flags, f"data.val_images={tmp_path}/images", "train.keep=all"), True)
    kept = checkpoint.load(config.run_dir / checkpoint.LAST)
    assert kept["step"] == ended["step"] and not kept["optimizer"]


def test_a_kill_in_the_last_evaluation_and_other_validation_annotations(
    tiny_yaml: Path, coco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has done its steps, but it has not ended before it is evaluated."""
    shutil.copy(coco_root / "val.json", tmp_path / "val.json")
    config = settings(tiny_yaml, tmp_path / "run", f"data.val_annotations={tmp_path}/val.json", "train.eval_every=0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_evaluate", fail_with(KeyboardInterrupt()))
        train(config)
    tree = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps(tree | {"annotations": tree["annotations"][1:]}))
    train(config, resume=True)
    assert [change["key"] for change in json.loads((config.run_dir / "changes.json").read_text())] == ["val_data"]


def test_a_moved_data_set_is_the_same_and_another_one_is_not(
    tiny: Config, tiny_yaml: Path, coco_root: Path, tmp_path: Path, finished_run: Path
) -> None:
    with stop_after(4):
        train(tiny)
    shutil.copytree(coco_root, tmp_path / "moved")
    places = [f"data.{split}_{what}={tmp_path}/moved/{split}{end}"
              for split in ("train", "val") for what, end in (("annotations", ".json"), ("images", ""))]  # fmt: skip
    tree = json.loads((tmp_path / "moved/train.json").read_text())
    (tmp_path / "moved/train.json").write_text(json.dumps(tree | {"annotations": tree["annotations"][1:]}))
    with pytest.raises(RunError, match=r"data\.train_annotations was .*/train\.json, is .*/moved/train\.json"):
        train(settings(tiny_yaml, tiny.run_dir, *places), resume=True)
    shutil.copy(coco_root / "train.json", tmp_path / "moved")
    train(settings(tiny_yaml, tiny.run_dir, *places, "name=renamed"), resume=True)
    assert weights(tiny.run_dir) == weights(finished_run)
    changes = json.loads((tiny.run_dir / "changes.json").read_text())
    assert {(change["step"], change["key"]) for change in changes} == {(4, place.split("=")[0]) for place in places}
    done = run_main("eval.py", tiny.run_dir)  # of best.pt, which was written before the move
    assert done.returncode == 0 and "metrics.json" in done.stdout, done.stderr


def test_a_moved_run_folder_is_not_started_anew(tiny: Config, tmp_path: Path, finished_run: Path) -> None:
    with stop_after(4):
        train(tiny)
    moved = tiny.run_dir.rename(tmp_path / "moved")
    done = run_main("train.py", moved / "config.yaml", "--resume")
    assert done.returncode == 2 and f"says that it is in {tiny.run_dir}; if it was moved or copied" in done.stderr
    assert f"add output_dir={moved}" in done.stderr
    done = run_main("train.py", moved / "config.yaml", "--resume", f"output_dir={moved}")
    assert done.returncode == 0 and "resumed after step 4" in done.stdout, done.stderr
    assert weights(moved) == weights(finished_run)


def test_resume_says_that_there_is_nothing_to_resume(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with stop_after(1):
        train(tiny, resume=True)
    assert f"no checkpoint in {tiny.run_dir}: the run starts at step 0" in capsys.readouterr().out


def test_an_error_in_a_worker_ends_the_command(tiny_yaml: Path, tmp_path: Path) -> None:
    """Workers ignore SIGTERM, with which multiprocessing ends them when the training process ends."""
    code = (
        "import sys; from retina.data import loader; from retina.train import train\n"
        "from retina.config_file import load_config\n"
        "def fail(*_): raise ValueError('a bug')\n"
        "loader.train_transform = fail; train(load_config(sys.argv[1], sys.argv[2:]))"
    )
    flags = [f"output_dir={tmp_path}/run", "data.workers=2"]
    ended = subprocess.run([sys.executable, "-c", code, tiny_yaml, *flags], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and "ValueError: a bug" in ended.stderr


def test_no_shared_memory_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from retina.data import batch_memory

    memory = batch_memory.BatchMemory(1)
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"batch of 0 MiB \(unable .*docker run --shm"):
        patch.setattr(batch_memory, "get_worker_info", lambda: type("Info", (), {"id": 0}))
        patch.setattr(torch.Tensor, "share_memory_", fail_with(RuntimeError("unable to allocate shared memory(shm)")))
        memory.take(100)
