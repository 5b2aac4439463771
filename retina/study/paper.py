"""The results of the paper, for comparison with those of a study."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from retina.config import Config

PAPER_TABLES = Path(__file__).with_name("paper_tables.yaml")


@functools.cache
def paper_tables() -> dict[str, Any]:
    """The paper's results by table: {"title", "columns", "rows": [{"set": settings, "result": numbers or a word}]}."""
    tables: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(PAPER_TABLES))  # type: ignore[assignment]
    return tables


def paper_row(tables: Sequence[dict[str, Any]], config: Config) -> dict[str, Any] | None:
    """The first row whose settings are those of `config`: {column: value}, or {"text": word}; None without one."""
    flat = config.flat()
    for table in tables:
        for row in table["rows"]:
            if all(flat[key] == value for key, value in row["set"].items()):
                result = row["result"]
                return {"text": result} if isinstance(result, str) else dict(zip(table["columns"], result, strict=True))
    return None
