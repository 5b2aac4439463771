"""tools/compare.py --annotations FILE: the detections are those of the images in FILE, or the run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_helpers import run_main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("images", ["others with the same ids", "one more", "the same in a folder"])
def test_detections_count_for_the_images_of_their_ids(
    runs: dict[str, Path], tmp_path: Path, truth: dict[str, Any], images: str
) -> None:
    if images == "one more":
        truth["images"].append({**truth["images"][0], "id": 999, "file_name": "more.png"})
    else:
        prefix = "folder/" if images == "the same in a folder" else "x"
        for entry in truth["images"]:
            entry["file_name"] = f"{prefix}{entry['file_name']}"
    (tmp_path / "given.json").write_text(json.dumps(truth))
    a, b = runs["worse_s0"], runs["better_s0"]
    done = run_main("compare.py", a, b, "--annotations", tmp_path / "given.json", "--output", tmp_path / "out")
    if images == "the same in a folder":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert f"{a}: its detections are not of the images of {tmp_path}/given.json" in done.stderr
