"""The one source of defaults: `load(file, overrides)` gives a frozen, checked `Config`.

A YAML file states differences from the defaults below and may name a `base` file beside it; `section.key=value`
on the command line comes last. OmegaConf reads and merges, pydantic checks. torch is never imported here, so a
mistyped key costs milliseconds, not seconds. Where published RetinaNets differ, the field says which value is whose.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]

BUSY = 75  # exit status of a training in whose folder another trains (sysexits.h: try again later)
NEUTRAL = ("output_dir", "data.workers", "train.checkpoint_every")  # keys that change no number of a training

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # COCO's

Backbone = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names file or flag, key, value and what is accepted."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Data(Section):
    """COCO-format files. `num_classes` and the names come from the training annotations, never from here."""

    train_annotations: str = "data/coco/annotations/instances_train2017.json"
    train_images: str = "data/coco/train2017"
    val_annotations: str = "data/coco/annotations/instances_val2017.json"
    val_images: str = "data/coco/val2017"
    short_side: tuple[Count, ...] = Field((800,), min_length=1, description="px; one is drawn for each sample")
    eval_short_side: Count | None = Field(None, description="px; None is the last of short_side")
    max_side: Count = 1333
    resize: Literal["opencv", "torchvision"] = Field("opencv", description="torchvision: bilinear on floats")
    pad_multiple: Count = Field(
        16, description="px; torchvision, mmdetection, detectron2: 32; 128 gives fewer batch shapes"
    )
    flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    zoom: tuple[Positive, Positive] = Field((1.0, 1.0), description="random scale; above 1 crops a window")
    photometric: Probability = Field(0.0, description="chance of a change of brightness, contrast, colour")
    empty_images: Literal["keep", "drop"] = Field("keep", description="drop: detectron2, mmdetection")
    crowd: Literal["ignore", "drop"] = Field("ignore", description="drop: torchvision, detectron2")
    unreadable: Literal["error", "skip"] = "error"
    workers: Annotated[int, Field(ge=0)] = 2

    @field_validator("zoom")
    @classmethod
    def _zoom_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first number must not be above the second")
        return value


class Model(Section):
    backbone: Backbone = "resnet50"
    weights: str | None = Field(
        "IMAGENET1K_V1",
        description="a torchvision weights name (IMAGENET1K_V1, COCO_V1, ...), a file, or null",
    )
    norm: Literal["frozen", "frozen_stats", "batch", "group"] = Field(
        "frozen",
        description="backbone; frozen: paper, torchvision V1; frozen_stats (affine trains): mmdetection",
    )
    norm_eps: NonNegative = Field(1e-5, description="torchvision's published V1 weights need 0")
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = Field(
        1, description="-1 trains all, 0 freezes the stem, 1 the stem and layer1, ... (mmdetection's count)"
    )
    channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(256, description="width of the FPN and of both heads")
    p6_from: Literal["c5", "p5"] = Field("c5", description="p5: torchvision V1")
    relu_before_p7: bool = Field(True, description="false: mmdetection")
    head_convs: Annotated[int, Field(ge=0)] = 4
    head_norm: Literal["none", "group"] = "none"
    prior: Annotated[float, Field(gt=0, lt=1)] = Field(0.01, description="pi of section 4.1")


class Anchors(Section):
    octave_base: Positive = Field(4.0, description="anchor side / stride at the first scale")
    scales: Count = Field(3, description="per octave")
    ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height / width")
    quantize: bool = Field(False, description="integer sizes, rounded corners: torchvision")
    stride: Literal["level", "padded"] = Field("level", description="padded: image // grid, torchvision")
    offset: Probability = Field(0.0, description="centre offset in strides; the paper has about 0.5")


class Assign(Section):
    positive_iou: Probability = 0.5
    negative_iou: Probability = 0.4
    low_quality: Literal["keep", "overwrite", "none"] = Field(
        "keep", description="best anchor of each box; overwrite: mmdetection, none: odtk"
    )
    padding: Literal["negative", "ignore"] = Field("negative", description="ignore: mmdetection")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou} must not be above positive_iou {self.positive_iou}")
        return self


class Loss(Section):
    cls: Literal["focal", "focal_star", "ohem", "ohem_1_3"] = Field(
        "focal", description="focal_star: appendix A; ohem: hard example mining, table 1d"
    )
    alpha: Probability | None = Field(0.25, description="weight of the positive class; null: no weighting")
    gamma: NonNegative = 2.0
    beta: float = Field(1.0, description="used by focal_star only")
    ohem_batch: Count = Field(128, description="anchors an image; used by ohem and ohem_1_3 only")
    ohem_nms: Probability = Field(0.5, description="used by ohem and ohem_1_3 only")
    box: Literal["smooth_l1", "l1", "giou"] = Field("smooth_l1", description="l1: mmdetection, torchvision V1")
    smooth_l1_beta: Positive = Field(0.11, description="used by smooth_l1 only")
    cls_weight: NonNegative = 1.0
    box_weight: NonNegative = 1.0
    normalizer: Literal["batch", "image", "ema"] = Field("batch", description="image: torchvision; ema: detectron2")
    ema_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    ema_start: Positive = 100.0

    @model_validator(mode="after")
    def _focal_star_divides_by_gamma(self) -> Self:
        if self.cls == "focal_star" and self.gamma == 0:
            raise ValueError("cls focal_star needs a gamma above 0")
        return self


class Detect(Section):
    score_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.05
    candidates: Count = Field(1000, description="per level, before NMS")
    nms_iou: Probability = 0.5
    max_detections: Count = 100
    max_ratio: Annotated[float, Field(gt=1)] = Field(
        62.5, description="box side / anchor side, 1000/16; in the GIoU loss too"
    )


class Train(Section):
    steps: Count = 90_000
    batch_size: Count = Field(16, description="images a step, over all processes and accumulations")
    accumulate: Count = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = Field(0.01, description="for reference_batch images a step; scaled linearly with the batch")
    reference_batch: Count = 16
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd only")
    weight_decay: NonNegative = 1e-4
    norm_weight_decay: NonNegative | None = Field(None, description="null: as weight_decay")
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[Probability, ...] = Field((2 / 3, 8 / 9), description="fractions of steps; each divides by 10")
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    clip_norm: NonNegative = Field(0.0, description="largest gradient norm; 0 is off")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the weights' average; 0 is off")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    compile: bool = False
    log_every: Count = 50
    eval_every: Annotated[int, Field(ge=0)] = Field(5000, description="steps; 0: only at the end")
    checkpoint_every: Count = 1000
    eval_batch: Count = 8


class Config(Section):
    """Everything that a training is a function of, apart from the files it reads."""

    name: str = Field("retina", pattern=r"^[\w.-]+$")
    output_dir: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: Data = Data()
    model: Model = Model()
    anchors: Anchors = Anchors()
    assign: Assign = Assign()
    loss: Loss = Loss()
    detect: Detect = Detect()
    train: Train = Train()

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.train.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of "
                f"train.accumulate {self.train.accumulate}"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Where a run of this configuration lives."""
        return Path(self.output_dir or f"runs/{self.name}")

    def flat(self) -> dict[str, Any]:
        """Every value by its key as on the command line, `section.key`; lists for tuples."""
        values: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json").items():
            values |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        return values

    def to_yaml(self) -> str:
        """The resolved configuration; `load` reads it back to an equal one."""
        return OmegaConf.to_yaml(OmegaConf.create(json.loads(self.model_dump_json())))


def load(file: str | Path, overrides: list[str] | None = None, said: str = "argument") -> Config:
    """Read `file` (and the base it names), then `section.key=value` overrides; errors call each of them a `said`.

    Raises ConfigError naming the file or flag, the key, the value, what is accepted and the nearest known name.
    """
    path = Path(file)
    merged: dict[str, Any] = {"name": path.stem}
    origin: dict[str, str] = {}
    for source, tree in [*_files(path), *_flags(overrides or [], said)]:
        _check_names(tree, Config, source)
        for key in _leaves(tree):
            origin[key] = source
        merged = OmegaConf.to_container(OmegaConf.merge(merged, tree))  # type: ignore[assignment]
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, origin, path) for item in error.errors())) from None


def from_yaml(text: str) -> Config:
    """What `Config.to_yaml` wrote. Raises ConfigError where it is of another version of the program."""
    try:
        return Config.model_validate(OmegaConf.to_container(OmegaConf.create(text)))
    except (ValidationError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"settings of another version: {error}") from None


def load_or_exit(file: str | Path, overrides: list[str] | None = None) -> Config:
    """`load` for a command line: a ConfigError is printed and the process ends with status 2."""
    try:
        return load(file, overrides)
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """A usage error: `message` on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _files(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file name, contents) from the outermost base to `path` itself."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files name each other in a circle")
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there is {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such configuration file{hint}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `section: {{key: value}}`, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return [(str(path), tree)]  # type: ignore[list-item]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected a file name, given {base!r}")
    return [*_files(path.parent / base, (*seen, path.resolve())), (str(path), tree)]  # type: ignore[list-item]


def _flags(overrides: list[str], said: str) -> list[tuple[str, dict[str, Any]]]:
    for flag in overrides:
        if "=" not in flag or flag.startswith("-"):
            raise ConfigError(f"{flag!r}: expected section.key=value, for example train.lr=0.005")
    try:
        return [(f"{said} {flag!r}", OmegaConf.to_container(OmegaConf.from_dotlist([flag]))) for flag in overrides]  # type: ignore[misc]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{' '.join(overrides)!r}: not readable: {error}") from None


def _check_names(tree: dict[str, Any], section: type[BaseModel], source: str, prefix: str = "") -> None:
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        if field is None:
            known = _known_keys()
            near = difflib.get_close_matches(f"{prefix}{key}", known, 1, 0.5) or [
                name for name in known if name.rpartition(".")[2] == key
            ]
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(section.model_fields)}"
            raise ConfigError(f"{source}: unknown key {prefix}{key}{hint}")
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{key}: expected a section with keys, given {value!r}")
            _check_names(value, kind, source, f"{prefix}{key}.")


def _known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        keys += _known_keys(kind, f"{prefix}{name}.") if is_section else [f"{prefix}{name}"]  # type: ignore[arg-type]
    return keys


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _explain(error: Any, origin: dict[str, str], path: Path) -> str:
    """One pydantic error as a sentence with its place: "file: key: given value, what is accepted"."""
    known = _known_keys()
    parts = [part for part in error["loc"] if isinstance(part, str)]
    key = next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in known), ".".join(parts))
    # A check over several keys has no key of its own: the last place that set one of them is to blame.
    source = next((place for name, place in reversed(origin.items()) if name.startswith(key)), str(path))
    given = "" if isinstance(error["input"], (dict, BaseModel)) else f"given {error['input']!r}; "
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    message = message.replace("a valid tuple", "a list, for example [800]").replace("Tuple should", "the list should")
    hint = ""
    if error["type"] == "literal_error":
        choices = [str(choice) for choice in get_args(_annotation(key)) if isinstance(choice, str)]
        near = difflib.get_close_matches(str(error["input"]), choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
    return f"{source}: {key + ': ' if key else ''}{given}{message}{hint}"


def _annotation(key: str) -> Any:
    section: Any = Config
    for part in key.split("."):
        section = section.model_fields[part].annotation
    return section
