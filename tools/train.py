"""Train a detector: python tools/train.py configs/shapes.yaml [section.key=value ...] [--resume] [--print-config]."""

from __future__ import annotations

import sys
from pathlib import Path

from retina.command_line import (
    EXIT_FOLDER_IN_USE,
    config_parser,
    exit_with_error,
    load_config_or_exit,
    with_path_errors,
)
from retina.config import Config
from retina.config_file import KEYS_TO_CHANGE, ConfigError
from retina.parent_process import end_with_parent, end_with_torchrun


@with_path_errors
def main() -> int:
    """Exit status: 0 after the last step or a stop by a signal, 1 if the run could not start or continue, 2 for a usage
    error, 75 if another process trains in the same folder."""
    parser = config_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="continue from the newest valid checkpoint")
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"with --resume: change {', '.join(KEYS_TO_CHANGE)} from the next step on; give it again at each resume",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input closes, for ablate.py")
    arguments = parser.parse_intermixed_args()
    if arguments.end_with_parent:
        end_with_parent()
    end_with_torchrun()
    changed_keys = [change.partition("=")[0] for change in arguments.change]
    if refused := [key for key in changed_keys if key not in KEYS_TO_CHANGE]:
        exit_with_error(f"--change {refused[0]}: only {', '.join(KEYS_TO_CHANGE)} can change within a run")
    if changed_keys and not arguments.resume:
        exit_with_error("--change needs --resume; the settings of a new run are arguments without --change")
    config = load_config_or_exit(arguments.config, [*arguments.overrides, *arguments.change])
    moves = ("output_dir=",) if config.output_dir else ("output_dir=", "name=")
    if arguments.resume and not any(given.startswith(moves) for given in arguments.overrides):
        check_place(Path(arguments.config), config)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return 0

    if config.data.shapes is not None:
        from retina.shapes import make_missing_shapes

        try:
            make_missing_shapes(config.data)
        except (ConfigError, OSError) as error:
            exit_with_error(f"data.shapes={config.data.shapes}: {error}")

    from retina.data.annotations import DataError  # torch is imported late, so that a usage error is reported at once
    from retina.model import CheckpointError, WeightsError
    from retina.train import RunError, RunFolderError, RunFolderInUseError, train

    try:
        train(config, arguments.resume, changed_keys)
    except RunFolderInUseError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FOLDER_IN_USE
    except RunFolderError as error:
        exit_with_error(str(error))
    except (RunError, ConfigError, DataError, CheckpointError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_place(file: Path, config: Config) -> None:
    """End with a usage error if `file` is the config.yaml of a run in another folder than it says."""
    folder = file.resolve().parent
    if file.name == "config.yaml" and (folder / "last.pt").exists() and config.run_dir.resolve() != folder:
        exit_with_error(
            f"{folder} has a run, and its config.yaml says that it is in {config.run_dir}; if it was moved or copied, "
            f"or this is another working directory, add output_dir={folder}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
