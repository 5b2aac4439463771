"""train.keep=weights: what a finished run keeps, and that it still serves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from train_helpers import settings, stop_after, weights

from retina.config import Config
from retina.config_file import load_config
from retina.evaluate import load
from retina.model import checkpoint
from retina.train.loop import train

pytestmark = pytest.mark.slow
UNLINK = Path.unlink


@pytest.fixture(scope="module")
def finished(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The same run with train.keep=all and =weights."""
    folder = tmp_path_factory.mktemp("keep")
    configs = {
        keep: load_config(tiny_yaml, [f"output_dir={folder / keep}", f"train.keep={keep}"])
        for keep in ("all", "weights")
    }
    for config in configs.values():
        train(config)
    return configs


def test_only_the_evaluated_weights_are_kept(finished: dict[str, Config]) -> None:
    everything, weights = finished["all"].run_dir, finished["weights"].run_dir
    assert sorted(path.name for path in weights.glob("*.pt")) == ["last.pt"]
    assert (weights / "last.pt").stat().st_size < 0.34 * (everything / "last.pt").stat().st_size
    full, kept = checkpoint.load(everything / "last.pt"), checkpoint.load(weights / "last.pt")
    assert checkpoint.digest(kept["model"]) == checkpoint.digest(full["ema"]) != checkpoint.digest(full["model"])
    for name in ("metrics.csv", "eval.json", "detections.json"):
        assert (weights / name).read_bytes() == (everything / name).read_bytes()


def test_the_detector_loads_from_it(finished: dict[str, Config]) -> None:
    models = [load(config.run_dir / "last.pt", device="cpu").model for config in finished.values()]
    first, second = (checkpoint.digest(model.state_dict()) for model in models)
    assert first == second


def test_a_finished_run_has_nothing_to_resume(finished: dict[str, Config]) -> None:
    config = finished["weights"]
    before = (config.run_dir / "last.pt").read_bytes()
    assert train(config, resume=True)["step"] == config.train.steps
    assert (config.run_dir / "last.pt").read_bytes() == before


def test_a_run_that_was_stopped_keeps_everything(tiny_yaml: Path, tmp_path: Path, finished: dict[str, Config]) -> None:
    """A kill before the last evaluation: last.pt must still have the optimizer, and the resumed run ends the same."""
    config = load_config(tiny_yaml, [f"output_dir={tmp_path / 'run'}", "train.keep=weights"])
    with stop_after(4):
        train(config)
    assert checkpoint.load(config.run_dir / "last.pt")["optimizer"]
    train(config, resume=True)
    assert [path.name for path in config.run_dir.glob("*.pt")] == ["last.pt"]
    assert (config.run_dir / "last.pt").read_bytes() and checkpoint.digest(
        checkpoint.load(config.run_dir / "last.pt")["model"]
    ) == checkpoint.digest(checkpoint.load(finished["weights"].run_dir / "last.pt")["model"])


def test_a_kill_at_the_end_is_repaired(tiny_yaml: Path, tmp_path: Path, finished: dict[str, Config]) -> None:
    """Killed between the last evaluation and the last checkpoint, or before the files that go are deleted."""
    config = settings(tiny_yaml, tmp_path / "run", "train.keep=weights")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Path, "unlink", fail_for_best)
        train(config)
    train(config, resume=True)
    assert sorted(path.name for path in config.run_dir.glob("*.pt")) == ["last.pt"]
    assert (config.run_dir / "last.pt").read_bytes() and weights(config.run_dir) == weights(finished["weights"].run_dir)


def fail_for_best(path: Path, missing_ok: bool = False) -> None:
    if path.name == checkpoint.BEST:
        raise OSError("killed")
    if path.exists() or not missing_ok:
        UNLINK(path)


def test_a_finished_run_can_be_reduced_later(finished: dict[str, Config], tmp_path: Path) -> None:
    shutil.copytree(finished["all"].run_dir, tmp_path / "run")
    train(finished["weights"].model_copy(update={"output_dir": str(tmp_path / "run")}), resume=True)
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == ["last.pt"]
    assert weights(tmp_path / "run") == weights(finished["weights"].run_dir)
