"""The settings of a generated data set. They and the version of the generator determine every byte of it.

A settings file is a YAML file with the fields of `ShapesSettings`, such as configs/data/shapes.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from retina.config_file import ConfigError, read_yaml
from retina.config_section import NonNegativeFloat, PositiveInt, Probability, Section
from retina.shapes.outlines import CLASSES

MAX_IMAGES = 1_000_000  # of a split
MIN_SIZE = 64
MIN_OBJECT_SIZE = 4


class ShapesSettings(Section):
    train: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = Field(1500, description="number of training images")
    val: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = Field(250, description="number of held-out images")
    size: Annotated[int, Field(ge=MIN_SIZE)] = Field(320, description="side of the square images, pixels")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="another seed gives other images")
    classes: Annotated[int, Field(ge=1, le=len(CLASSES))] = Field(8, description="number of classes")
    class_imbalance: Annotated[float, Field(ge=1)] = Field(
        5.0, description="frequency of the most frequent class / that of the rarest"
    )
    objects: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (1, 10, 25),
        description="objects per image: fewest, most likely, limit that is not reached (triangular distribution)",
    )
    object_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None,
        description="longer side of an object, pixels: smallest, most likely, largest (triangular over the logarithm); "
        "null: 8, size / 6, size / 2",
    )
    class_color: Probability = Field(0.95, description="fraction of the objects whose hue is near that of their class")

    @model_validator(mode="after")
    def _triples_are_ordered(self) -> Self:
        for name in ("objects", "object_size"):
            low, mode, high = getattr(self, name) or (0, 1, 2)
            if not low <= mode <= high or low == high:
                raise ValueError(f"{name}: expected three ascending numbers, given {[low, mode, high]}")
        smallest, _, largest = self.size_range
        if not MIN_OBJECT_SIZE <= smallest <= largest <= self.size:
            raise ValueError(f"object_size: expected {MIN_OBJECT_SIZE} to {self.size}, given {[smallest, largest]}")
        return self

    @property
    def size_range(self) -> tuple[float, float, float]:
        """The longer side of an object in pixels: smallest, most likely, largest."""
        return self.object_size or (8, self.size / 6, self.size / 2)


def load_settings(path: str | Path) -> ShapesSettings:
    """Read a settings file. Raises ConfigError, which names the file, the key, the value and what is accepted."""
    tree: dict[str, Any] = read_yaml(Path(path), "settings file of a generated data set", "`key: value`")
    try:
        return ShapesSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {message}" for message in messages(error))) from None


def messages(error: ValidationError) -> list[str]:
    """Each error as "key: given value; what is accepted"."""
    known = ", ".join(ShapesSettings.model_fields)
    result = []
    for item in error.errors():
        key = f"{item['loc'][0]}: " if item["loc"] else ""
        given = "" if isinstance(item["input"], dict) else f"given {item['input']!r}; "
        text = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        result.append(
            f"{key}unknown key; known: {known}" if item["type"] == "extra_forbidden" else f"{key}{given}{text}"
        )
    return result
