"""Helpers of the commands in tools/: the arguments of a configuration, reading it, and reporting errors."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from retina.config import Config
from retina.config_file import ConfigError, load_config

# What tools/train.py says where another process trains in the same folder, and its exit status (EX_TEMPFAIL of
# sysexits.h: try later). torchrun turns the status into 1.
FOLDER_IN_USE = "another process is training here"
EXIT_FOLDER_IN_USE = 75


def file_path(text: str) -> Path:
    """The `type` of an argument that is a path. `~` is the home folder, also where quotes keep it from the shell."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises for an unknown user


def config_parser(description: str | None, config_is_optional: bool = False) -> argparse.ArgumentParser:
    """A parser for `CONFIG [section.key=value ...]`, to which a command adds its flags.

    Call `parse_intermixed_args` on it: the flags may stand between the overrides.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    nargs = "?" if config_is_optional else None
    parser.add_argument("config", type=os.path.expanduser, nargs=nargs, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that come last")
    return parser


def load_config_or_exit(file: str | Path, overrides: list[str] | None = None) -> Config:
    """`load_config`, but a ConfigError is printed and the process exits with status 2."""
    try:
        return load_config(file, overrides)
    except ConfigError as error:
        exit_with_error(str(error))


def exit_with_error(message: str) -> NoReturn:
    """Print the usage error `message` to stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def with_path_errors(main: Callable[[], int]) -> Callable[[], int]:
    """`main` of a command, but an OSError about a path, such as one in a folder without permission, is printed, and the
    process exits with status 2. Here, because Path.is_file and its like raise such errors wherever they are called."""

    @functools.wraps(main)
    def wrapped() -> int:
        try:
            return main()
        except OSError as error:
            if error.filename is None:
                raise
            exit_with_error(f"{error.filename}: {error.strerror}")

    return wrapped
