"""The order of the modules: imports point one way, between the packages and within them."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Package(NamedTuple):
    modules: list[str]  # a module may import only modules before it
    may_import: list[str]  # other packages


# The files at the top of retina/ are two packages here: those that every package may use, and the detector's own steps.
BASE = ["config_section", "config", "config_file", "command_line", "atomic_files", "device", "parent_process", "boxes",
        "exif", "file_suffixes", "plural", "file_search", "cores"]  # fmt: skip
PACKAGES = {
    "base": Package(BASE, []),
    "losses": Package(
        [
            *("arguments", "box", "class_weights", "one_pass", "focal_cpu", "focal_labels_cpu", "focal_terms_triton"),
            *("focal_triton", "focal", "softmax_cpu", "softmax", "nms_triton", "mining", "modules"),
        ],
        [],
    ),
    "data": Package(
        ["annotations", "coco", "cache", "normalization", "batch", "batch_memory", "augment", "sampling", "loader"],
        ["base"],
    ),
    "model": Package(
        ["fused", "backbone", "anchors", "retinanet", "weights_file", "checkpoint", "key_tables", "weights",
         "pretrained", "saved_folder"],
        ["base", "losses"],
    ),
    "detector": Package(
        ["assign_triton", "assign", "criterion", "detect_triton", "detect"], ["base", "losses", "data", "model"]
    ),
    "plots": Package(["style", "fonts", "result_files", "boxes", "detections", "run", "document"], ["base"]),
    "analysis": Package(
        ["results_file", "scoring", "matches", "accumulate", "intervals", "errors", "thresholds", "calibration",
         "recall", "report", "gallery", "tables", "text", "pictures", "page", "comparison", "runs", "image_errors",
         "compared_runs", "comparison_text", "comparison_page"],
        ["base", "data", "plots"],
    ),
    "evaluate": Package(
        ["detections", "inference", "detector", "loading", "coco", "tta", "cost", "loss_distribution"],
        ["base", "losses", "data", "model", "detector", "analysis"],
    ),
    "export": Package(
        ["resize", "program", "network", "int8", "exported", "onnx", "aot", "verify", "job"],
        ["base", "data", "model", "detector", "evaluate"],
    ),
    "hub": Package([], ["base", "model", "evaluate"]),
    "check": Package(
        ["codes", "findings", "box_checks", "annotation_checks", "image_checks", "anchor_fit", "advice", "data_check",
         "text", "pictures", "page"],
        ["base", "data", "model", "detector", "plots"],
    ),
    "train": Package(
        ["errors", "distributed", "schedule", "events", "logbook", "step", "step_flags", "state", "start", "failures",
         "loop"],
        ["base", "data", "model", "detector", "analysis", "evaluate", "plots", "check"],
    ),
    "shapes": Package(["outlines", "settings", "layout", "painting", "scene", "writing"], ["base"]),
    "convert": Package(["checks", "voc", "yolo_folder", "yolo"], ["base"]),
    "study": Package(
        ["cells", "paper", "study_file", "trial_storage", "launch", "outcome", "estimate", "loop", "results", "figures",
         "verdicts", "csv_tables", "report"],
        ["base", "data", "plots", "analysis"],
    ),
    "classify_demo": Package(["problems", "experiment", "summary", "figure"], ["losses", "plots"]),
}  # fmt: skip
AT_TOP = {module: package for package in ("base", "detector") for module in PACKAGES[package].modules}


def module_name(path: Path) -> str:
    """retina/data/coco.py -> data.coco; the __init__.py of a package has the name of the package."""
    return ".".join(path.relative_to(ROOT / "retina").with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for path in (ROOT / "retina").rglob("*.py")}
MODULES = {name: path for name, path in PATHS.items() if name != "__init__"}  # retina/__init__.py imports late


def imported(path: Path) -> set[str]:
    """The full names of what a file imports: modules, and the names taken from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def modules_imported(path: Path) -> set[str]:
    """The modules and packages of retina that a file imports, by their names in MODULES."""
    names = set()
    for target in imported(path):
        first, *parts = target.split(".")
        longest_first = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        if first == "retina" and (module := next((name for name in longest_first if name in MODULES), None)):
            names.add(module)
    return names


def package_of(module: str) -> str:
    first = module.split(".")[0]
    return AT_TOP.get(first, first)


def test_every_module_is_listed() -> None:
    listed = set(AT_TOP)
    for name, package in PACKAGES.items():
        if name not in AT_TOP.values():
            listed |= {name, *(f"{name}.{module}" for module in package.modules)}
    assert set(MODULES) == listed


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    own = package_of(name)
    modules, may_import = PACKAGES[own]
    for target in modules_imported(MODULES[name]):
        package = package_of(target)
        if package != own:
            assert package in may_import, f"{name} imports {target}, and {own} may import only {may_import}"
        elif target != own and name != own:  # the __init__.py of a package may import all of its modules
            target, importer = target.split(".")[-1], name.split(".")[-1]
            assert modules.index(target) < modules.index(importer), f"{name} imports {target}, which comes after it"


def test_packages_are_in_one_order() -> None:
    order = list(PACKAGES)
    for name, package in PACKAGES.items():
        assert all(order.index(other) < order.index(name) for other in package.may_import), name


def test_nothing_imports_the_bare_package() -> None:
    """`import retina` would hide from the tests above what is used of it."""
    for folder in ("retina", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(
                alias.name.split(".")[0] == "retina"
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import)
                for alias in node.names
            ), path


@pytest.mark.parametrize("name", [name for name in PATHS if package_of(name) == "losses"])
def test_losses_import_only_torch(name: str) -> None:
    roots = {target.split(".")[0] for target in imported(PATHS[name])}
    standard = {"__future__", "collections", "functools", "importlib", "math", "numbers", "os", "typing", "warnings"}
    triton = {"triton"} if name.endswith("_triton") else set()  # comes with torch; only CUDA needs it
    assert roots <= {"torch", "retina"} | standard | triton


def test_only_augment_imports_albumentations() -> None:
    users = {name for name, path in PATHS.items() if any(t.startswith("albumentations") for t in imported(path))}
    assert users == {"data.augment"}


@pytest.mark.parametrize(
    "package",
    ["config", "config_file", "command_line", "atomic_files", "analysis", "convert", "plots", "shapes", "study"],
)
def test_packages_of_fast_commands_import_no_torch(package: str) -> None:
    """Not even through other modules, so that their commands start at once."""
    waiting = [name for name in PATHS if name == package or name.startswith(f"{package}.")]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        assert not any(target.split(".")[0] in ("torch", "torchvision") for target in imported(PATHS[name])), name
        # Importing a module imports its package too.
        targets = {part for target in modules_imported(PATHS[name]) for part in (target, target.split(".")[0])}
        new = (targets & PATHS.keys()) - seen
        seen |= new
        waiting += new


def test_pip_installs_every_package_and_file() -> None:
    """Also py.typed, without which the annotations do not count for those who use the package (PEP 561)."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "retina").rglob("__init__.py")}
    assert set(settings["packages"]) == packages | {"retina_tools", "retina_presets"}
    data = {path.relative_to(ROOT) for path in (ROOT / "retina").rglob("*.*") if path.is_file()}
    listed = {Path(*package.split("."), name) for package, names in settings["package-data"].items() for name in names}
    others = {path for path in data if path.suffix not in (".py", ".pyc")}
    assert Path("retina/py.typed") in others and others == {path for path in listed if path.parts[0] == "retina"}
