"""The figures and the HTML page of the report of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import inspect_page, needs_chromium
from command_helpers import loaded_by
from matplotlib.axes import Axes
from PIL import Image
from report_helpers import (
    ALPHAS,
    GRID,
    ONE_SEED,
    THREE_SEEDS,
    UNSAFE_NAME,
    finish_all,
    report_markdown,
    write_failure,
    write_finished,
    write_study,
)

from retina.study.figures import telling_keys
from retina.study.report import write_report
from retina.study.results import Group
from retina.study.study_file import load_study


def test_lines_are_named_by_the_settings_that_tell_them_apart() -> None:
    settings = [
        {"loss.gamma": 0, "model.prior": prior, "train.optimizer": optimizer, "train.lr": lr}
        for optimizer, lr in (("adamw", 0.003), ("sgd", 0.01))
        for prior in (0.01, 0.5)
    ]
    assert telling_keys([Group(each, [], {}) for each in settings]) == ["model.prior", "train.optimizer"]
    settings.append(settings[0] | {"train.lr": 0.1})
    assert telling_keys([Group(each, [], {}) for each in settings]) == ["model.prior", "train.optimizer", "train.lr"]


@pytest.mark.slow
def test_figures_depend_on_the_axes(tmp_path: Path) -> None:
    """Two axes: a heat map, and a curve over each key with numbers; keys that change together: one; words: none."""
    pairs = "cells: [" + ", ".join(f"{{loss.gamma: {g}, loss.alpha: {0.75 - g / 4}}}" for g in (0, 1, 2)) + "]"
    gap = "cells: [" + ", ".join(
        f"{{loss.gamma: {g}, loss.alpha: {a}}}" for g in (0, 1, 2) for a in (0.2, 0.7)[g % 2 :]
    )
    for text, expected in [
        (gap + "]", {"heat_map.png", "AP_over_gamma.png"}),
        (GRID, {"heat_map.png", "AP_over_gamma.png"}),
        (pairs, {"AP_over_gamma.png"}),
        (
            "axes: {loss.gamma: [0, 1, 2, 3, 4, 5, 6, 7], loss.alpha: [0.1, 0.5, 0.9]}",
            {"heat_map.png", "AP_over_gamma.png"},
        ),
        ("axes: {loss.box: [giou, l1, smooth_l1]}", set()),
        ("axes: {loss.box: [giou, l1, smooth_l1], loss.gamma: [1, 2]}", {"heat_map.png"}),
    ]:
        study = write_study(tmp_path, f"{text}\n{ONE_SEED}")
        for index, cell in enumerate(study.cells):
            write_finished(cell, 20 + index)
        files = write_report(study)
        assert {file.name for file in files[4:]} == expected | {"classes.png", "losses.png"}, text
        sentence = "The figures show the best cell, the worst, and 5 evenly spaced by rank between them: "
        assert (sentence in (study.folder / "report.md").read_text()) == (len(study.cells) > 7)
        for file in files[4:]:
            with Image.open(file) as image:
                assert 600 < image.width < 2200 and not {"date", "Creation Time"} & set(image.info)


def test_classes_are_sorted_by_frequency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = finish_all(write_study(tmp_path, ALPHAS + THREE_SEEDS))
    seen: list[list[str]] = []
    original = Axes.set_xticks

    def spy(self: Axes, ticks: Any, labels: Any = None, **others: Any) -> Any:
        seen.append(list(labels or []))
        return original(self, ticks, labels, **others)

    monkeypatch.setattr(Axes, "set_xticks", spy)
    write_report(study)
    assert ["often\n(6)", r"a<b|c \$1_\$2_" "\n(3)", "rare\n(1)"] in seen


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    study = finish_all(write_study(tmp_path, ALPHAS + THREE_SEEDS))
    first = {path: path.read_bytes() for path in write_report(study)}
    assert len(first) == 7 and first == {path: path.read_bytes() for path in write_report(study)}
    assert {path.name for path in study.folder.iterdir()} == {path.name for path in first}, "no temporary file remains"


def test_missing_data_does_not_stop_a_report(tmp_path: Path) -> None:
    study = finish_all(write_study(tmp_path, ALPHAS + THREE_SEEDS))
    missing = tmp_path / "elsewhere"
    (tmp_path / "base.yaml").write_text(f"data: {{train_annotations: {missing}.json}}")
    study = load_study(tmp_path / "study.yaml", output=tmp_path / "out")
    finish_all(study)
    for cell in study.cells:
        (cell.folder / "metrics.csv").unlink()
    text = report_markdown(study)
    assert "an unknown number of training images" in text and "classes.png" in text and "losses.png" not in text


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [500, 1300])
def test_page_in_a_browser(tmp_path: Path, width: int) -> None:
    study = write_study(tmp_path, GRID + THREE_SEEDS)
    for cell in study.cells[1:]:
        write_finished(cell, 20 + cell.seed, milliseconds=9.0)
    write_failure(study.cells[0], f"No <b>{UNSAFE_NAME}</b> " + "word " * 40)
    write_report(study)
    page = inspect_page((study.folder / "report.html").read_text(), tmp_path, width)
    assert page["images"] == [True] * 4, "heat map, curve, classes, losses"
    assert page["rows"] == [6, 1, 6, 18], "main, failed, speed, all runs"
    assert (page["title"], page["lang"]) == ("study-base", "en")
    assert f"No <b>{UNSAFE_NAME}</b> word" in page["text"]


@pytest.mark.slow
def test_import_loads_no_torch_optuna_or_pyplot() -> None:
    assert loaded_by("retina.study.report", {"torch", "optuna", "matplotlib.pyplot"}) == "[]"


@pytest.mark.parametrize(("seeds", "ending"), [(ONE_SEED, "one seed"), (THREE_SEEDS, "deviation over seeds")])
def test_titles_claim_a_deviation_for_several_seeds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: str, ending: str
) -> None:
    titles: list[str] = []
    monkeypatch.setattr("retina.study.figures.style_axes", lambda axes, title, empty: titles.append(title))
    study = write_study(tmp_path, f"{GRID}\n{seeds}")
    finish_all(study)
    write_report(study)
    found = [title for title in titles if "seed" in title]
    assert len(found) == 3 and all(title.split(";")[0].endswith(ending) for title in found), titles
