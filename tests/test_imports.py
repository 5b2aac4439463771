"""The order of the layout: a file imports only what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "config", "files", "lifeline", "study", "ledger", "trainings", "ablate", "boxes",
    "losses.arguments", "losses.box", "losses.class_weights", "losses.focal_cpu", "losses.focal_triton", "losses.focal",
    "losses.softmax", "losses.mining", "losses.modules", "losses",
    "data", "data.scenes", "data.shapes", "data.coco", "data.voc", "data.augment", "data.loader",
    "model", "model.backbone", "model.anchors", "model.retinanet", "model.pretrained",
    "assign_triton", "assign", "criterion", "detect", "device", "evaluate", "checkpoint", "plots", "logbook",
    "schedule", "train", "predict", "loss_distribution", "results", "markup", "study_plots", "report",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "retina").with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (ROOT / "retina").rglob("*.py") if path.parent.name != "__pycache__"}


def test_every_module_has_its_place() -> None:
    assert set(MODULES) - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_what_stands_above(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    for target in imported(MODULES[name]):
        if target.startswith("retina.") and target != "retina.__version__":
            parts = target.removeprefix("retina.")
            assert any(parts == module or parts.startswith(f"{module}.") for module in above), (
                f"{name} imports {target}"
            )


@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("losses")])
def test_losses_stand_alone(name: str) -> None:
    roots = {target.split(".")[0] for target in imported(MODULES[name])}
    standard = {"__future__", "collections", "functools", "importlib", "math", "numbers", "os", "typing", "warnings"}
    triton = {"triton"} if name == "losses.focal_triton" else set()  # it comes with torch, and only CUDA asks for it
    assert roots <= {"torch", "retina"} | standard | triton
    assert all(
        t == "retina" or t.startswith("retina.losses") for t in imported(MODULES[name]) if t.startswith("retina")
    )


def test_only_augment_knows_albumentations_and_plots_no_torch() -> None:
    users = {name for name, path in MODULES.items() if any(t.startswith("albumentations") for t in imported(path))}
    assert users == {"data.augment"}
    for name in (
        "config",
        "files",
        "study",
        "ablate",
        "plots",
        "results",
        "markup",
        "study_plots",
        "report",
    ):  # so that their commands start at once
        assert not any(target.startswith("torch") for target in imported(MODULES[name])), name
