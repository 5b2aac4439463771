"""The pages agree with the code: code blocks run, tables equal the output of their scripts, links lead to files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "data" / "README.md"]


def test_code_of_the_losses_page_runs() -> None:
    page = (ROOT / "docs" / "losses.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) > 5
    namespace: dict[str, object] = {}
    for block in blocks:  # in order, in one namespace
        exec(compile(block, "docs/losses.md", "exec"), namespace)


def test_table_of_wrong_variants_equals_the_output_of_its_script() -> None:
    page = (ROOT / "docs" / "losses.md").read_text()
    shown = re.search(r"<!-- focal_variants -->\n(.*?)\n<!-- /focal_variants -->", page, flags=re.DOTALL)
    script = [sys.executable, str(ROOT / "benchmarks" / "focal_variants.py")]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout.strip()
    assert shown is not None and shown[1].strip() == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
