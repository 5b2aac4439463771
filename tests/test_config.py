from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from retina.config import Config
from retina.config_file import ConfigError, load_config
from retina.shapes import load_settings
from retina.study.study_file import load_study

REPOSITORY = Path(__file__).parents[1]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.loss.alpha, config.loss.gamma) == (0.25, 2.0)
    assert (config.assign.positive_iou, config.assign.negative_iou, config.model.prior) == (0.5, 0.4, 0.01)
    assert (config.train.lr, config.train.batch_size, config.train.steps) == (0.01, 16, 90_000)


def test_base_file_then_file_then_flags(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "train: {lr: 0.5, steps: 7}\nloss: {gamma: 1}\n")
    path = write(tmp_path / "custom.yaml", "base: base.yaml\ntrain: {lr: 1e-3}\n")
    config = load_config(path, ["train.steps=9"])
    assert (config.train.lr, config.train.steps, config.loss.gamma) == (0.001, 9, 1.0)
    assert config.name == "custom" and config.run_dir == Path("runs/custom")


def test_resolved_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path / "a.yaml", "data: {zoom: [0.5, 2], short_side: [640, 672]}\nmodel: {weights: null}\n")
    )
    assert load_config(write(tmp_path / "b.yaml", config.to_yaml())) == config


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("train.lrr=1", ["unknown key train.lrr", "did you mean train.lr?"]),
        ("lr=1", ["unknown key lr", "did you mean train.lr?"]),
        ("train.lr=-1", ["train.lr", "given -1", "greater than 0"]),
        ("train.lr=nan", ["train.lr", "given 'nan'", "finite"]),
        ("loss.gamma=.inf", ["loss.gamma", "given inf", "finite"]),
        ("loss.alpha=1.5", ["loss.alpha", "given 1.5", "less than or equal to 1"]),
        ("train.steps=many", ["train.steps", "given 'many'", "integer"]),
        ("model.norm=frozn", ["model.norm", "given 'frozn'", "'batch'", "did you mean frozen?"]),
        ("data.short_side=800", ["data.short_side", "given 800", "a list"]),
        ("data.zoom=[2,1]", ["data.zoom", "must not be above"]),
        ("assign.negative_iou=0.9", ["negative_iou 0.9", "positive_iou 0.5"]),
        ("train.accumulate=3", ["train.batch_size 16", "train.accumulate 3"]),
        ("loss={cls: ohem_1_3, ohem_batch: 3}", ["loss", "ohem_batch 3", "at least 4"]),
        ("train=3", ["train", "a section", "given 3"]),
        ("loss.gamma=???", ["loss.gamma: given ???, expected a value"]),
        ("train.lr", ["section.key=value"]),
    ],
)
def test_errors_name_flag_key_value_and_what_is_accepted(tmp_path: Path, flag: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path / "a.yaml", "{}"), [flag])
    for part in [flag, *expected]:
        assert part in str(error.value)


@pytest.mark.parametrize("flag", ["data.short_side[0]=700", "data.short_side={a: 1}"])
def test_a_list_is_given_as_a_whole(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=r"not usable as settings: .*; a list is given as a whole") as error:
        load_config(write(tmp_path / "a.yaml", "data: {short_side: [600, 800]}"), [flag])
    assert flag in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {lr: 1, lr: 2}", "lr"),  # plain YAML would keep the last of two equal keys
        ("- a\n- b", "expected"),
        ("train: [", "not readable as YAML"),
        ("base: nowhere.yaml", "no such configuration file"),
        ("base: a.yaml", "circle"),
        ("modle: {norm: batch}", "unknown key modle"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(write(tmp_path / "a.yaml", text))
    assert ".yaml" in str(error.value)


def test_a_missing_base_names_both_files_and_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine.yaml", "base: configs/bccd.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config("mine.yaml")
    assert str(error.value) == (
        f"mine.yaml: base: configs/bccd.yaml is relative to the folder of mine.yaml; {tmp_path}/configs/bccd.yaml: "
        "no such configuration file"
    )
    write(tmp_path / "mine.yaml", f"base: {tmp_path}/gone.yaml")
    with pytest.raises(ConfigError, match=rf"^mine.yaml: base: {tmp_path}/gone.yaml: no such .* has {tmp_path}/mine"):
        load_config("mine.yaml")


def test_a_folder_in_place_of_a_file_names_the_file_to_give(tmp_path: Path) -> None:
    run, configs, empty = (tmp_path / name for name in ("run", "configs", "empty"))
    for folder in (run, configs, empty):
        folder.mkdir()
    for path in (run / "config.yaml", run / "other.yaml", configs / "a.yaml", configs / "b.yaml"):
        write(path, "{}")
    for folder, hint in ((run, f"; give {run}/config.yaml"), (configs, f"; give {configs}/a.yaml or {configs}/b.yaml"),
                         (empty, "")):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            load_config(folder)
        assert str(error.value) == f"{folder}: a folder, expected a configuration file{hint}"


def test_the_home_folder_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load_config("configs/retina_r50.yaml", ["output_dir=~/run", "data.cache=~/a~b", "data.val_images=~/val"])
    assert (config.run_dir, config.data.cache, config.data.val_images) == (
        Path("/home/ada/run"),
        "/home/ada/a~b",
        "/home/ada/val",
    )


def test_the_home_folder_in_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write(tmp_path / "home/base.yaml", "train: {steps: 7}")
    assert load_config(write(tmp_path / "a.yaml", "base: ~/base.yaml")).train.steps == 7


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match=r"frozen"):
        Config().train.lr = 1.0  # type: ignore[misc]


@pytest.mark.slow
def test_config_error_exits_2_before_torch_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train: {lrr: 1}")
    tool = REPOSITORY / "tools/train.py"
    run = subprocess.run([sys.executable, "-X", "importtime", tool, path], capture_output=True, text=True)
    assert run.returncode == 2
    assert f"{path}: unknown key train.lrr; did you mean train.lr?" in run.stderr
    assert "| torch\n" not in run.stderr and "|   torch" not in run.stderr


STUDIES = sorted(REPOSITORY.glob("configs/ablations/*.yaml"))
GENERATED_DATA = sorted(REPOSITORY.glob("configs/data/*.yaml"))
CONFIGS = sorted(set(REPOSITORY.glob("configs/**/*.yaml")) - {*STUDIES, *GENERATED_DATA})


@pytest.mark.parametrize("path", [*CONFIGS, *STUDIES], ids=lambda path: path.name)
def test_shipped_configs_load_and_name_their_command(path: Path) -> None:
    tool = "ablate" if path in STUDIES else "train"
    if path in STUDIES:
        load_study(path)
    else:
        load_config(path)
    header = path.read_text().split("\n\n")[0]
    assert (
        header.startswith("#") and f"python tools/{tool}.py {path.relative_to(REPOSITORY)}" in header
    ) or "tools/eval.py" in header


CHOICES = {
    "data.resize", "data.normalization", "data.pad_multiple", "data.empty_images", "data.crowd", "model.stride_in_1x1",
    "model.norm", "model.norm_eps", "model.frozen_stages", "model.p6_from", "model.relu_before_p7", "model.head_norm",
    "anchors.quantize", "anchors.stride", "anchors.offset", "assign.low_quality", "assign.padding", "loss.box",
    "loss.normalizer", "detect.clip", "detect.empty_boxes", "detect.max_ratio", "detect.max_detections",
}  # fmt: skip


@pytest.mark.parametrize("name", ["paper", "torchvision_v1", "torchvision_v2", "detectron2", "mmdetection"])
def test_presets_name_every_choice(name: str) -> None:
    """All in which published RetinaNets differ, so that no default of this project can change a preset."""
    presets, named = REPOSITORY / "configs/presets", set()
    path: Path | None = presets / f"{name}.yaml"
    while path is not None and path.parent == presets:
        tree = yaml.safe_load(path.read_text())
        named |= {f"{section}.{key}" for section, keys in tree.items() if section != "base" for key in keys}
        path = path.parent / tree["base"] if "base" in tree else None
    assert not CHOICES - named


@pytest.mark.parametrize("path", GENERATED_DATA, ids=lambda path: path.name)
def test_shipped_settings_of_generated_data_load_and_are_used(path: Path) -> None:
    load_settings(path)
    name = str(path.relative_to(REPOSITORY))
    assert path.read_text().startswith("#") and any(load_config(config).data.shapes == name for config in CONFIGS)
