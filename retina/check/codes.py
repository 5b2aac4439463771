"""The findings by their codes, read from codes.yaml beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from retina.config_file import read_yaml

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Code(NamedTuple):
    severity: Severity
    title: str  # what was found; stands after a count
    effect: str  # what it does to the training
    advice: str  # what to do


CODES = {
    name: Code(**values)
    for name, values in read_yaml(Path(__file__).parent / "codes.yaml", "table of findings", "`code: texts`").items()
}
