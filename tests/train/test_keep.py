"""train.keep=weights: what a finished run keeps, and that it still serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retina.config import Config
from retina.config_file import load_config
from retina.evaluate.inference import load_detector
from retina.model import checkpoint
from retina.train.loop import train

pytestmark = pytest.mark.slow


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
    models = [
        load_detector(config, config.run_dir / "last.pt", None, torch.device("cpu"))[0] for config in finished.values()
    ]
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
    stopped = config.model_copy(update={"train": config.train.model_copy(update={"keep": "all"})})
    train(stopped)
    (config.run_dir / "last.pt").unlink()  # previous.pt is from step 4 of 6
    train(config, resume=True)
    assert [path.name for path in config.run_dir.glob("*.pt")] == ["last.pt"]
    assert (config.run_dir / "last.pt").read_bytes() and checkpoint.digest(
        checkpoint.load(config.run_dir / "last.pt")["model"]
    ) == checkpoint.digest(checkpoint.load(finished["weights"].run_dir / "last.pt")["model"])
