"""The order of the layout: imports point one way, between the rooms and within them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import what stands above it. Each line is a room, in the order in which one may import another.
ROOMS: dict[str, list[str]] = {
    "": ["config", "config_file", "command_line", "atomic_files", "device", "boxes"],
    "losses": [
        "arguments", "box", "class_weights", "focal_cpu", "focal_triton", "focal", "softmax", "mining", "modules",
    ],
    "data": ["coco", "augment", "loader"],
    "model": ["backbone", "anchors", "retinanet", "pretrained", "checkpoint"],
    "detector": ["assign_triton", "assign", "criterion", "detect"],  # files at the top, as those of the first line
    "evaluate": ["inference", "coco", "latency", "loss_distribution"],
    "plots": ["style", "result_files", "boxes", "detections", "run", "document"],
    "train": ["errors", "distributed", "schedule", "logbook", "step", "state", "loop"],
    "shapes": ["outlines", "layout", "painting", "scene", "writing"],
    "convert": ["voc"],
    "study": [
        "cells", "paper", "study_file", "parent_process", "trial_storage", "launch", "outcome", "estimate", "loop",
        "results", "figures", "report",
    ],
    "classify_demo": ["problems", "experiment", "summary", "figure"],
}  # fmt: skip
AT_TOP = ("", "detector")
ORDER = [name if room in AT_TOP else f"{room}.{name}" for room, names in ROOMS.items() for name in names]
DETECTOR = ("", "losses", "data", "model", "detector", "evaluate")


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
    return ".".join(path.relative_to(ROOT / "retina").with_suffix("").parts)


PATHS = {module_name(path): path for path in (ROOT / "retina").rglob("*.py")}
MODULES = {name: path for name, path in PATHS.items() if not name.endswith("__init__")}


def modules_imported(name: str) -> set[str]:
    """The modules of this project that a module imports, by their names in ORDER."""
    targets = {target.removeprefix("retina.") for target in imported(MODULES[name]) if target.startswith("retina.")}
    found = set()
    for target in targets - {"__version__"}:
        room = [module for module in ORDER if module.startswith(f"{target}.")]  # `from retina.room import name`
        whole = next((module for module in ORDER if target == module or target.startswith(f"{module}.")), None)
        assert room or whole or target.split(".")[0] in ROOMS, f"{name} imports {target}, which has no place"
        found |= {whole} if whole else set(room)
    return found


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_what_stands_above(name: str) -> None:
    below = modules_imported(name) - set(ORDER[: ORDER.index(name)])
    assert not below, f"{name} imports {', '.join(sorted(below))}, which stand below it"


@pytest.mark.parametrize("room", DETECTOR)
def test_the_detector_imports_no_study_shapes_or_plots(room: str) -> None:
    for name in ROOMS[room]:
        name = name if room in AT_TOP else f"{room}.{name}"
        others = {target.split(".")[0] for target in modules_imported(name) if "." in target}
        assert others <= set(DETECTOR), f"{name} imports {others}"


@pytest.mark.parametrize("name", [name for name in PATHS if name.startswith("losses.")])
def test_losses_stand_alone(name: str) -> None:
    roots = {target.split(".")[0] for target in imported(PATHS[name])}
    standard = {"__future__", "collections", "functools", "importlib", "math", "numbers", "os", "typing", "warnings"}
    triton = {"triton"} if name == "losses.focal_triton" else set()  # it comes with torch, and only CUDA asks for it
    assert roots <= {"torch", "retina"} | standard | triton
    assert all(t == "retina" or t.startswith("retina.losses") for t in imported(PATHS[name]) if t.startswith("retina"))


def test_only_augment_knows_albumentations() -> None:
    users = {name for name, path in PATHS.items() if any(t.startswith("albumentations") for t in imported(path))}
    assert users == {"data.augment"}


@pytest.mark.parametrize(
    "room", ["config", "config_file", "command_line", "atomic_files", "convert", "plots", "shapes", "study"]
)
def test_commands_without_a_network_import_no_torch(room: str) -> None:
    """Not even through what they import: their commands start at once."""
    seen: set[str] = set()
    waiting = [name for name in PATHS if name == room or name.startswith(f"{room}.")]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        targets = imported(PATHS[name])
        assert not any(target.split(".")[0] in ("torch", "torchvision") for target in targets), name
        for target in targets:
            parts = target.removeprefix("retina.").split(".")
            steps = [".".join(parts[:n]) for n in range(1, len(parts) + 1)] if target.startswith("retina.") else []
            candidates = [other for step in steps for other in (step, f"{step}.__init__")]
            waiting += [other for other in candidates if other in PATHS and other not in seen]
