"""tools/eval.py does not replace the results of a run by others."""

from __future__ import annotations

from pathlib import Path

import pytest
from retina_tools.eval import check_own_results

from retina.config import Config
from retina.config_file import load_config


@pytest.fixture
def run(tiny: Config) -> Path:
    tiny.run_dir.mkdir(parents=True)
    (tiny.run_dir / "config.yaml").write_text(tiny.to_yaml())
    (tiny.run_dir / "metrics.csv").touch()
    return tiny.run_dir


def test_what_may_replace_the_results(run: Path, tiny: Config, tmp_path: Path) -> None:
    for name in ("last.pt", "best.pt", "detections.json"):
        check_own_results(run, tiny, run / name, tta=False)
    (run / "metrics.csv").unlink()
    for folder in (tmp_path / "new", run):  # not the folder of a run: one does not exist, one has only a config
        check_own_results(folder, tiny, "COCO_V1", tta=True)


@pytest.mark.parametrize("source", ["run/other.json", "run/model.onnx", "detections.json", "other/best.pt", "COCO_V1"])
def test_what_may_not(run: Path, tiny: Config, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.parent / source if "." in source else source
    with pytest.raises(SystemExit) as ended:
        check_own_results(run, tiny, path, tta=False)
    assert ended.value.code == 2
    assert f"for those with {path} give another --output" in capsys.readouterr().err


def test_other_settings_and_test_time_augmentation(
    run: Path, tiny: Config, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load_config(tiny_yaml, [f"output_dir={run}", "detect.nms_iou=0.3"])
    for config, tta, expected in ((other, False, "detect.nms_iou=0.3"), (tiny, True, "--tta")):
        with pytest.raises(SystemExit):
            check_own_results(run, config, run / "best.pt", tta=tta)
        assert f"with {expected} give another --output" in capsys.readouterr().err
