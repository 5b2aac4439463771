"""The order of the modules: imports point one way, between the packages and within them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import only modules before it. Each entry is a package of retina/; the files at the top are in two.
PACKAGES: dict[str, list[str]] = {
    "": ["config", "config_file", "command_line", "atomic_files", "device", "boxes"],
    "losses": [
        "arguments", "box", "class_weights", "focal_cpu", "focal_triton", "focal", "softmax", "mining", "modules",
    ],
    "data": ["coco", "augment", "loader"],
    "model": ["backbone", "anchors", "retinanet", "pretrained", "checkpoint"],
    "detector": ["assign_triton", "assign", "criterion", "detect"],  # files at the top, like those of ""
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
ORDER = [name if package in AT_TOP else f"{package}.{name}" for package, names in PACKAGES.items() for name in names]
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
    modules = set()
    for target in targets - {"__version__"}:
        members = [name for name in ORDER if name.startswith(f"{target}.")]  # `from retina.package import name`
        module = next((name for name in ORDER if target == name or target.startswith(f"{name}.")), None)
        assert members or module or target.split(".")[0] in PACKAGES, (
            f"{name} imports {target}, which is in no package above"
        )
        modules |= {module} if module else set(members)
    return modules


def test_every_module_is_listed() -> None:
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_earlier_modules(name: str) -> None:
    later = modules_imported(name) - set(ORDER[: ORDER.index(name)])
    assert not later, f"{name} imports {', '.join(sorted(later))}, which come after it"


@pytest.mark.parametrize("package", DETECTOR)
def test_the_detector_imports_no_study_shapes_or_plots(package: str) -> None:
    for name in PACKAGES[package]:
        name = name if package in AT_TOP else f"{package}.{name}"
        others = {target.split(".")[0] for target in modules_imported(name) if "." in target}
        assert others <= set(DETECTOR), f"{name} imports {others}"


@pytest.mark.parametrize("name", [name for name in PATHS if name.startswith("losses.")])
def test_losses_import_only_torch(name: str) -> None:
    roots = {target.split(".")[0] for target in imported(PATHS[name])}
    standard = {"__future__", "collections", "functools", "importlib", "math", "numbers", "os", "typing", "warnings"}
    triton = {"triton"} if name == "losses.focal_triton" else set()  # comes with torch; only CUDA needs it
    assert roots <= {"torch", "retina"} | standard | triton
    assert all(t == "retina" or t.startswith("retina.losses") for t in imported(PATHS[name]) if t.startswith("retina"))


def test_only_augment_knows_albumentations() -> None:
    users = {name for name, path in PATHS.items() if any(t.startswith("albumentations") for t in imported(path))}
    assert users == {"data.augment"}


@pytest.mark.parametrize(
    "package", ["config", "config_file", "command_line", "atomic_files", "convert", "plots", "shapes", "study"]
)
def test_packages_of_fast_commands_import_no_torch(package: str) -> None:
    """Not even through other modules, so that their commands start at once."""
    seen: set[str] = set()
    waiting = [name for name in PATHS if name == package or name.startswith(f"{package}.")]
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
