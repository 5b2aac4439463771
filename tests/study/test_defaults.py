"""The hash of a cell leaves out settings that have their defaults, so a changed default needs another version."""

from __future__ import annotations

import json
from pathlib import Path

from retina import __version__
from retina.config import Config

FILE = Path(__file__).with_name("defaults.json")


def test_a_changed_default_needs_another_version() -> None:
    """To add a setting, or after a new version: write `Config().flat()` and the version into defaults.json again."""
    recorded, defaults = json.loads(FILE.read_text()), Config().flat()
    if recorded["version"] == __version__:
        changed = {key: value for key, value in recorded["defaults"].items() if defaults.get(key) != value}
        assert not changed, f"finished cells of studies have other numbers now: increase retina.__version__ ({changed})"
    assert recorded == {"version": __version__, "defaults": defaults}, "write defaults.json again"
