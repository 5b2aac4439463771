"""Train a detector: python tools/train.py configs/shapes.yaml [section.key=value ...] [--resume] [--print-config]."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import threading

from retina.config import fail, load_or_exit


def end_with_parent() -> None:
    """From now on this process is killed when its standard input closes, which a pipe does however its writer ends: a
    training whose owner is gone must not write on beside the next owner's."""
    if hasattr(fcntl, "F_SETSIG"):  # Linux does it even while an import keeps all threads waiting
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:  # elsewhere; under torchrun, whose processes share an input; and where it has closed already
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """0 after the last step or a stop by signal, 1 if the run could not go on, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that come last")
    parser.add_argument("--resume", action="store_true", help="continue from the newest valid checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input closes, for ablate.py")
    arguments = parser.parse_intermixed_args()
    if arguments.end_with_parent:
        end_with_parent()
    config = load_or_exit(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return 0

    from retina.data.coco import DataError  # torch is imported only now: a usage error costs no time
    from retina.logbook import RunError, RunFolderError
    from retina.model.pretrained import WeightsError
    from retina.train import train

    try:
        train(config, arguments.resume)
    except RunFolderError as error:
        fail(str(error))
    except (RunError, DataError, WeightsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
