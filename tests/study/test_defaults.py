"""The hash of a cell leaves out settings that have their defaults, so a changed default needs another version."""

from __future__ import annotations

import json
from pathlib import Path

from retina import __version__
from retina.config import Config

FILE = Path(__file__).with_name("defaults.json")


def test_a_changed_default_needs_another_version() -> None:
    """After a new setting or a new version, `python tests/study/test_defaults.py` writes defaults.json again."""
    recorded, defaults = json.loads(FILE.read_text()), Config().flat()
    if recorded["version"] == __version__:
        changed = {key: value for key, value in recorded["defaults"].items() if defaults.get(key) != value}
        assert not changed, f"finished cells of studies have other numbers now: increase retina.__version__ ({changed})"
    assert recorded == {"version": __version__, "defaults": defaults}, "run python tests/study/test_defaults.py"


if __name__ == "__main__":
    FILE.write_text(json.dumps({"version": __version__, "defaults": Config().flat()}, indent=1) + "\n")
