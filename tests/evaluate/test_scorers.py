"""Which scorer has the last word: hotcoco during a training, pycocotools at its end and in tools/eval.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_helpers import run_main

from retina.analysis import scoring
from retina.config import Config
from retina.model import checkpoint
from retina.train import loop


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scorers in the order in which they are called. The quick one is wrong by 0.25 AP."""
    called: list[str] = []
    quick, final = scoring.score, scoring.score_with_pycocotools

    def wrong(*arguments: Any) -> scoring.Evaluation:
        called.append("hotcoco")
        evaluation = quick(*arguments)
        return evaluation._replace(metrics=evaluation.metrics | {"AP": evaluation.metrics["AP"] + 0.25})

    def right(*arguments: Any) -> scoring.Evaluation:
        called.append("pycocotools")
        return final(*arguments)

    for module in (scoring, loop):
        monkeypatch.setattr(module, "score", wrong)
    monkeypatch.setattr(scoring, "score_with_pycocotools", right)
    return called


@pytest.mark.slow
def test_the_last_evaluation_of_a_run(calls: list[str], tiny: Config) -> None:
    """The run fails after everything is written, and again when it is resumed: so a study shows it as failed."""
    tiny.run_dir.parent.mkdir(parents=True, exist_ok=True)
    (tiny.run_dir.parent / "config.yaml").write_text(tiny.to_yaml())
    done = run_main("train.py", tiny.run_dir.parent / "config.yaml")  # evaluates at steps 3 and 6
    assert calls == ["hotcoco", "hotcoco", "pycocotools"]
    first, last = json.loads((tiny.run_dir / "eval.json").read_text())
    assert first["AP"] >= 0.25 > last["AP"], "the number of pycocotools is kept"
    assert done.returncode == 1 and done.stderr.startswith("error: TWO SCORERS DISAGREE. ")
    assert checkpoint.load(tiny.run_dir / "last.pt")["step"] == 6 and (tiny.run_dir / "best.pt").is_file()
    resumed = run_main("train.py", tiny.run_dir.parent / "config.yaml", "--resume")
    assert resumed.returncode == 1 and resumed.stderr == done.stderr


def test_eval_fails(calls: list[str], tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("[]")
    done = run_main("eval.py", tiny_yaml, "--detections", tmp_path / "found.json", "--output", tmp_path)
    assert done.returncode == 1 and "ERROR: TWO SCORERS DISAGREE" in done.stderr and calls == ["hotcoco", "pycocotools"]
    assert json.loads((tmp_path / "metrics.json").read_text())["AP"] == 0
