"""Which scorer has the last word: hotcoco during a training, pycocotools at its end and in tools/eval.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_helpers import run_main

from retina.analysis import scoring
from retina.config import Config
from retina.train import loop
from retina.train.loop import train


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
def test_the_last_evaluation_of_a_run(calls: list[str], tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny)  # evaluates at steps 3 and 6
    assert calls == ["hotcoco", "hotcoco", "pycocotools"]
    first, last = json.loads((tiny.run_dir / "eval.json").read_text())
    assert first["AP"] >= 0.25 > last["AP"], "the number of pycocotools is kept"
    assert capsys.readouterr().out.count("ERROR: TWO SCORERS DISAGREE") == 1


def test_eval_fails(calls: list[str], tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("[]")
    done = run_main("eval.py", tiny_yaml, "--detections", tmp_path / "found.json", "--output", tmp_path)
    assert done.returncode == 1 and "ERROR: TWO SCORERS DISAGREE" in done.stderr and calls == ["hotcoco", "pycocotools"]
    assert json.loads((tmp_path / "metrics.json").read_text())["AP"] == 0
