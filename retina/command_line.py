"""What every command of tools/ shares: reading its configuration, and how it reports a usage error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from retina.config import Config
from retina.config_file import ConfigError, load_config

EXIT_FOLDER_IN_USE = 75  # exit status of a training in whose folder another trains (sysexits.h: try again later)


def load_config_or_exit(file: str | Path, overrides: list[str] | None = None) -> Config:
    """`load` for a command line: a ConfigError is printed and the process ends with status 2."""
    try:
        return load_config(file, overrides)
    except ConfigError as error:
        exit_with_error(str(error))


def exit_with_error(message: str) -> NoReturn:
    """A usage error: `message` on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
