from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from retina.config_file import ConfigError
from retina.study.cells import Study, StudyError, format_value
from retina.study.paper import paper_row, paper_tables
from retina.study.study_file import load_study

REPOSITORY = Path(__file__).parents[2]
STUDIES = REPOSITORY / "configs/ablations"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "val.json").write_text("{}")
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{train_annotations: {tmp_path}/train.json, val_annotations: {tmp_path}/val.json}}\n")
    return path


def study(config: Path, text: str, *overrides: str, base: Path | None = None) -> Study:
    file = config.with_name("study.yaml")
    file.write_text(f"base: {config.name}\n{text}")
    return load_study(file, base, overrides, config.parent / "out")


def test_axes_give_all_combinations_seed_by_seed(base: Path) -> None:
    loaded = study(base, "axes: {loss.gamma: [0, 2], loss.alpha: [0.25, null]}\nseeds: [5, 6]\n")
    assert [(c.settings["loss.gamma"], c.settings["loss.alpha"], c.seed) for c in loaded.cells] == [
        (g, a, s) for s in (5, 6) for g in (0.0, 2.0) for a in (0.25, None)
    ]
    for cell in loaded.cells:
        assert (cell.config.loss.gamma, cell.config.loss.alpha, cell.config.seed) == (
            *cell.settings.values(),
            cell.seed,
        )
        assert cell.folder == base.parent / "out/cells" / cell.key
    assert loaded.name == "study-mine" and loaded.keys == ["loss.gamma", "loss.alpha"]
    assert loaded.cells[1].label == "gamma 0, alpha none, seed 5"


def test_cells_set_and_at(base: Path) -> None:
    text = (
        "set: {train.lr: 0.5}\ncells: [{anchors.ratios: [1]}, {anchors.ratios: [0.5, 1, 2]}]\n"
        "at: {mine: {set: {model.backbone: resnet101}, seeds: [3]}, other: {axes: {loss.gamma: [1]}}}\n"
    )
    loaded = study(base, text, "train.steps=7")
    assert {(c.config.train.lr, c.config.train.steps, c.config.model.backbone, c.seed) for c in loaded.cells} == {
        (0.5, 7, "resnet101", 3)
    }
    assert [c.settings["anchors.ratios"] for c in loaded.cells] == [[1.0], [0.5, 1.0, 2.0]]
    other = base.with_name("other.yaml")
    other.write_text(base.read_text())
    (cell,) = study(base, text, base=other).cells
    assert cell.settings == {"loss.gamma": 1.0} and cell.config.model.backbone == "resnet50" and cell.seed == 0


def test_cells_may_name_their_keys_in_any_order(base: Path) -> None:
    loaded = study(base, "cells: [{loss.gamma: 0, loss.alpha: 0.75}, {loss.alpha: 0.25, loss.gamma: 2}]\n")
    assert [list(cell.settings.items()) for cell in loaded.cells] == [
        [("loss.gamma", 0.0), ("loss.alpha", 0.75)],
        [("loss.gamma", 2.0), ("loss.alpha", 0.25)],
    ]


def test_default_seed_is_that_of_the_base(base: Path) -> None:
    base.write_text(base.read_text() + "seed: 5\n")
    (cell,) = study(base, "axes: {loss.gamma: [1]}\n").cells
    assert cell.seed == cell.config.seed == 5


def test_equal_runs_share_a_folder(base: Path) -> None:
    (one,) = study(base, "axes: {loss.gamma: [2]}\n").cells
    (equal,) = study(base, "cells: [{loss.alpha: 0.25}]\n", "data.workers=7").cells
    assert one.key == equal.key, "the defaults, and a number of workers that changes nothing"
    (other,) = study(base, "axes: {loss.gamma: [2]}\n", "train.lr=0.5").cells
    (other_seed,) = study(base, "axes: {loss.gamma: [2]}\nseeds: [1]\n").cells
    (base.parent / "train.json").write_text('{"images": []}')
    (other_annotations,) = study(base, "axes: {loss.gamma: [2]}\n").cells
    assert len({one.key, other.key, other_seed.key, other_annotations.key}) == 4


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("axes: {loss.gama: [0]}", ["study.yaml 'loss.gama=0'", "unknown key loss.gama", "did you mean loss.gamma?"]),
        ("axes: {loss.gamma: [0, -1]}", ["study.yaml 'loss.gamma=-1'", "given -1", "greater than or equal to 0"]),
        ("axes: {loss.alpha: [1.5]}", ["loss.alpha", "given 1.5", "less than or equal to 1"]),
        ("axes: {loss.gamma: []}", ["axes.loss.gamma", "at least one value"]),
        ("axes: {loss.gamma: 2}", ["axes.loss.gamma", "list"]),
        ("axis: {loss.gamma: [2]}", ["axis: unknown key", "axes"]),
        ("seeds: [0]", ["axes", "cells"]),
        ("axes: {loss.gamma: [1]}\ncells: [{loss.gamma: 1}]", ["not both"]),
        ("cells: [{loss.gamma: 1}, {loss.alpha: 1}]", ["the same keys"]),
        ("axes: {loss.gamma: [0, 0.0]}", ["two cells are the same run: gamma 0, seed 0, and gamma 0, seed 0"]),
        ("axes: {seed: [0, 1]}", ["seed", "seeds:"]),
        ("set: {seed: 4}\naxes: {loss.gamma: [0]}", ["seed", "seeds:"]),
        ("cells: [{loss: {gamma: 0}}]", ["loss is a section", "loss.gamma: 2"]),
        ("axes: {loss.gamma: [0]}\nat: {mine: {paper: [table1a]}}", ["at.mine.paper: unknown key; known: set, axes"]),
        ("axes: {loss.gamma: [0]}\nseeds: [1, 1]", ["seeds", "twice"]),
        ("axes: {loss.gamma: [0]}\nseeds: [-1]", ["seeds", "greater than or equal to 0"]),
        ("axes: {loss.gamma: [0]}\npaper: [table9]", ["no table 'table9'", "table1b"]),
        ("axes: [", ["not readable as YAML"]),
    ],
)
def test_error_messages(base: Path, text: str, messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        study(base, text)
    for part in ["study.yaml", *messages]:
        assert part in str(error.value)


def test_a_missing_study_file_is_an_error() -> None:
    with pytest.raises(StudyError, match=r"table9\.yaml: no such study file; the folder has .*table1a\.yaml"):
        load_study(STUDIES / "table9.yaml")


def test_tables_equal_the_paper() -> None:
    """Compared with a second transcription of the paper's numbers, if that file exists."""
    reference = REPOSITORY.parent / "shared/reference/paper_tables.yaml"
    if not reference.is_file():
        pytest.skip("no second transcription of the paper's tables")
    transcribed, ours = yaml.safe_load(reference.read_text()), paper_tables()
    for name in ("table1a", "table1b", "table1c", "table1d", "table1e", "table3"):
        assert ours[name]["columns"] == transcribed[name]["columns"]
        rows = [(row["set"], row["result"]) for row in ours[name]["rows"]]
        if name == "table1a":
            assert {str(s["loss.alpha"]): r for s, r in rows} == {
                str(float(k)): v for k, v in transcribed[name]["rows"].items()
            }
            continue
        names = {
            "gamma": "loss.gamma", "alpha": "loss.alpha", "beta": "loss.beta", "method": "loss.cls",
            "batch": "loss.ohem_batch", "nms": "loss.ohem_nms", "scales": "anchors.scales",
        }  # fmt: skip
        assert len(rows) == len(transcribed[name]["rows"])
        for (settings, result), row in zip(rows, transcribed[name]["rows"], strict=True):
            assert result == row["result"]
            for key, value in row.items():
                if key in names:
                    assert settings[names[key]] == value
            if "ratios" in row:
                assert len(settings["anchors.ratios"]) == row["ratios"]
            if "depth" in row:
                assert (settings["model.backbone"], settings["data.short_side"]) == (
                    f"resnet{row['depth']}",
                    [row["scale"]],
                )


@pytest.mark.parametrize("name", ["table1a", "table1b", "table1c", "table1d", "table1e", "table3"])
def test_every_row_of_a_table_has_its_cell(name: str) -> None:
    """On COCO each cell of a study is compared with a number of the paper, and every row of the table has a cell."""
    loaded = load_study(STUDIES / f"{name}.yaml", STUDIES / "base/coco.yaml")
    tables = [paper_tables()[table] for table in loaded.paper]
    results = [str(paper_row(tables, cell.config)) for cell in loaded.cells]
    assert "None" not in results
    for row in paper_tables()[name]["rows"]:
        assert str(dict(zip(paper_tables()[name]["columns"], row["result"], strict=True))) in results


def test_missing_data_is_named_for_every_cell(base: Path) -> None:
    loaded = study(base, "axes: {data.val_images: [here, there]}\n")
    assert {"data.val_images: no here", "data.val_images: no there"} <= set(loaded.missing_data())
    assert not any("annotations" in message for message in loaded.missing_data())


def test_format_value() -> None:
    assert [format_value(v) for v in (0.25, None, 2.0, [0.5, 1.0], "ohem", 128)] == [
        "0.25",
        "none",
        "2",
        "0.5 1",
        "ohem",
        "128",
    ]
