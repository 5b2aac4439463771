from pathlib import Path

from retina.check.data_check import DataCheck


def write_page(check: DataCheck, file: Path) -> None: ...
