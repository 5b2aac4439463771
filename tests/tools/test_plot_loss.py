from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from retina_tools import plot_loss

from retina.losses import focal_star_loss, sigmoid_focal_loss


def test_curves_by_hand() -> None:
    """At x_t = 0: FL = 2^-gamma ln 2, derivative -2^-gamma (1/2 + gamma / 2 ln 2); FL* = ln(1 + e^-beta) / gamma."""
    zero = torch.zeros(1, dtype=torch.float64)
    for gamma in plot_loss.GAMMAS:
        value, slope = plot_loss.curve(partial(sigmoid_focal_loss, gamma=gamma), zero)
        assert value.item() == pytest.approx(2**-gamma * math.log(2))
        assert slope.item() == pytest.approx(-(2**-gamma) * (0.5 + gamma / 2 * math.log(2)))
    value, slope = plot_loss.curve(partial(focal_star_loss, gamma=2.0, beta=1.0), zero)
    assert value.item() == pytest.approx(math.log1p(math.exp(-1)) / 2)
    assert slope.item() == pytest.approx(-1 / (1 + math.e))


def test_figure(tmp_path: Path) -> None:
    with Image.open(plot_loss.draw(tmp_path / "curves.png")) as picture:
        picture.load()
        assert picture.width == 1600


def test_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["plot_loss.py", "--output", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        plot_loss.main()
    assert stop.value.code == 2 and "cannot be written to" in capsys.readouterr().err
