"""The pages agree with the code: code blocks run, tables equal the output of their scripts, links and paths exist."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_helpers import save_random_detector

from retina.check.codes import CODES
from retina.config import Config
from retina.detect import detect
from retina.model.checkpoint import digest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "data/README.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def test_code_of_the_losses_page_runs() -> None:
    blocks = python_blocks("losses.md")
    assert len(blocks) > 5
    namespace: dict[str, object] = {}
    for block in blocks:  # in order, in one namespace
        exec(compile(block, "docs/losses.md", "exec"), namespace)


@pytest.mark.slow
def test_code_of_the_python_page_runs(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_random_detector(tmp_path / "runs/mine/best.pt", tiny)
    shutil.copy(Path(tiny.data.val_images) / "0000.png", "image.jpg")
    namespace: dict[str, Any] = {}
    blocks = python_blocks("python.md")
    for block in blocks[:2]:
        exec(compile(block, "docs/python.md", "exec"), namespace)
    found = detect(namespace["outputs"], namespace["anchors"], namespace["batch"].sizes, tiny.detect)[0]
    expected = namespace["detector"]("image.jpg")
    assert len(expected) > 5 and torch.equal(found.scores, expected.scores), "the outputs are those of the detector"
    before = digest(namespace["detector"].model.state_dict())
    for block in blocks[2:]:
        exec(compile(block, "docs/python.md", "exec"), namespace)
    assert digest(namespace["detector"].model.state_dict()) == digest(namespace["model"].state_dict()) != before


def test_table_of_wrong_variants_equals_the_output_of_its_script() -> None:
    page = (ROOT / "docs" / "losses.md").read_text()
    shown = re.search(r"<!-- focal_variants -->\n(.*?)\n<!-- /focal_variants -->", page, flags=re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(ROOT / "benchmarks" / "focal_variants.py"), run_name="__main__")
    assert shown is not None and shown[1].strip() == output.getvalue().strip()


@each_page
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def paths_in_code(text: str) -> list[str]:
    """The paths of the repository in code blocks and in code spans of a page, except those with placeholders."""
    code = re.findall(r"^```.*?^```|`[^`]+`", text, flags=re.DOTALL | re.MULTILINE)
    words = re.split(r"[\s`\"'(),;]+", " ".join(code))
    paths = [word for word in words if re.match(r"(tests|retina|tools|benchmarks|configs)/", word)]
    paths = [path.split("::")[0].rstrip(".:") for path in paths]  # without the name of a test, and punctuation
    return [path for path in paths if not re.search(r"[*<{$]|NAME", path)]


def test_paths_in_code_by_hand() -> None:
    text = (
        "See `tests/a.py::test_b`, tests/not_code.py, `configs/*.yaml`, `retina/<name>.py`, `tools/`, `docs/x.md`.\n"
        "```\npython tools/train.py configs/NAME.yaml # as in configs/a.yaml.\n```\nand `python tools/eval.py a=b`"
    )
    expected = ["tests/a.py", "tools/", "tools/train.py", "configs/a.yaml", "tools/eval.py"]
    assert paths_in_code(text) == expected


@each_page
def test_paths_in_code_exist(page: Path) -> None:
    missing = [path for path in paths_in_code(page.read_text()) if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names {', '.join(missing)}"


def test_table_of_findings_equals_the_codes() -> None:
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (ROOT / "docs" / "data.md").read_text().splitlines()
        if re.match(r"\| `[a-z0-9-]+` \| (error|warning|note) \|", line)
    ]
    assert rows == [[f"`{name}`", *code] for name, code in CODES.items()]


def test_the_example_of_the_data_page_has_the_texts_of_the_codes() -> None:
    example = (ROOT / "docs" / "data.md").read_text().split("## An example")[1].split("```")[1]
    found = re.findall(r"^([A-Z]+) ([a-z-]+) in \w+: (.*) \(\d+\)$", example, flags=re.MULTILINE)
    assert len(found) == 3
    for severity, name, title in found:
        code = CODES[name]
        assert (severity, title) == (code.severity.upper(), code.title)
        assert f"\n  {code.effect}\n  What to do: {code.advice}\n" in example
