"""Generate the data set `shapes` in COCO format: python tools/make_shapes.py --output data/shapes [--size 320 ...]

--settings reads a settings file such as configs/data/shapes_long_tail.yaml; flags beside it change single settings.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retina.command_line import file_path
from retina.config_file import ConfigError
from retina.shapes import ShapesSettings, load_settings, write_shapes
from retina.shapes.settings import messages
from retina.shapes.writing import ANNOTATIONS


def main() -> int:
    """Exit status: 0 with the data set written, 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=file_path, default=Path("data/shapes"), help="folder to write (%(default)s)")
    parser.add_argument("--settings", type=file_path, help="YAML file with the settings below")
    for name, field in ShapesSettings.model_fields.items():
        triple = {"nargs": 3, "metavar": ("LOW", "MODE", "HIGH")} if name in ("objects", "object_size") else {}
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{field.description} ({default})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text, **triple)  # type: ignore[arg-type]
    parser.add_argument("--processes", type=int, help="number of processes that draw (one for each core)")
    arguments = parser.parse_args()
    flags: dict[str, Any] = {name: getattr(arguments, name) for name in ShapesSettings.model_fields}
    flags = {name: value for name, value in flags.items() if value is not None}
    try:
        base = load_settings(arguments.settings) if arguments.settings else ShapesSettings()
        settings = ShapesSettings.model_validate(base.model_dump() | flags)
        if not write_shapes(arguments.output, settings, arguments.processes):
            print(f"{arguments.output} is already complete with these settings: nothing to do")
    except ValidationError as error:
        parser.error("; ".join(f"--{message.replace('_', '-')}" for message in messages(error)))
    except (ConfigError, ValueError, OSError) as error:
        parser.error(str(error))  # exits with 2
    print_summary({split: arguments.output / name for split, name in ANNOTATIONS.items()})
    return 0


def print_summary(paths: dict[str, Path]) -> None:
    """The number of images, and of objects by class, as a table."""
    counts, crowds = {}, {}
    for split, path in paths.items():
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects = [names[a["category_id"]] for a in content["annotations"] if not a["iscrowd"]]
        counts[split], crowds[split] = Counter(objects), len(content["annotations"]) - len(objects)
        empty = len(content["images"]) - len({a["image_id"] for a in content["annotations"]})
        print(f"{path}: {len(content['images'])} images ({empty} of them empty), {len(objects)} objects")
    print(f"\n{'objects':<12}{'train':>8}{'val':>8}")
    for name in names.values():
        print(f"{name:<12}{counts['train'][name]:>8}{counts['val'][name]:>8}")
    print(f"{'(crowds)':<12}{crowds['train']:>8}{crowds['val']:>8}")


if __name__ == "__main__":
    raise SystemExit(main())
