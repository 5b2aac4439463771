"""The one source of defaults: every setting of a run, its type, its default and what it accepts.

A frozen `Config` of sections. config_file.py reads one from YAML and the command line. torch is never imported here.
Where published RetinaNets differ, the field says which value is whose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
KEYS_WITHOUT_EFFECT = (
    "output_dir",
    "data.workers",
    "train.checkpoint_every",
)  # keys that change no number of a training
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # COCO's
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


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Data(Section):
    """COCO-format files. `num_classes` and the names come from the training annotations, never from here."""

    train_annotations: str = "data/coco/annotations/instances_train2017.json"
    train_images: str = "data/coco/train2017"
    val_annotations: str = "data/coco/annotations/instances_val2017.json"
    val_images: str = "data/coco/val2017"
    short_side: tuple[PositiveInt, ...] = Field((800,), min_length=1, description="px; one is drawn for each sample")
    eval_short_side: PositiveInt | None = Field(None, description="px; None is the last of short_side")
    max_side: PositiveInt = 1333
    resize: Literal["opencv", "torchvision"] = Field("opencv", description="torchvision: bilinear on floats")
    pad_multiple: PositiveInt = Field(
        16, description="px; torchvision, mmdetection, detectron2: 32; 128 gives fewer batch shapes"
    )
    flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    zoom: tuple[PositiveFloat, PositiveFloat] = Field((1.0, 1.0), description="random scale; above 1 crops a window")
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
    norm_eps: NonNegativeFloat = Field(1e-5, description="torchvision's published V1 weights need 0")
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
    octave_base: PositiveFloat = Field(4.0, description="anchor side / stride at the first scale")
    scales: PositiveInt = Field(3, description="per octave")
    ratios: tuple[PositiveFloat, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height / width")
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
    gamma: NonNegativeFloat = 2.0
    beta: float = Field(1.0, description="used by focal_star only")
    ohem_batch: PositiveInt = Field(128, description="anchors an image; used by ohem and ohem_1_3 only")
    ohem_nms: Probability = Field(0.5, description="used by ohem and ohem_1_3 only")
    box: Literal["smooth_l1", "l1", "giou"] = Field("smooth_l1", description="l1: mmdetection, torchvision V1")
    smooth_l1_beta: PositiveFloat = Field(0.11, description="used by smooth_l1 only")
    cls_weight: NonNegativeFloat = 1.0
    box_weight: NonNegativeFloat = 1.0
    normalizer: Literal["batch", "image", "ema"] = Field("batch", description="image: torchvision; ema: detectron2")
    ema_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    ema_start: PositiveFloat = 100.0

    @model_validator(mode="after")
    def _focal_star_divides_by_gamma(self) -> Self:
        if self.cls == "focal_star" and self.gamma == 0:
            raise ValueError("cls focal_star needs a gamma above 0")
        return self


class Detect(Section):
    score_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.05
    candidates: PositiveInt = Field(1000, description="per level, before NMS")
    nms_iou: Probability = 0.5
    max_detections: PositiveInt = 100
    max_ratio: Annotated[float, Field(gt=1)] = Field(
        62.5, description="box side / anchor side, 1000/16; in the GIoU loss too"
    )


class Train(Section):
    steps: PositiveInt = 90_000
    batch_size: PositiveInt = Field(16, description="images a step, over all processes and accumulations")
    accumulate: PositiveInt = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = Field(0.01, description="for reference_batch images a step; scaled linearly with the batch")
    reference_batch: PositiveInt = 16
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd only")
    weight_decay: NonNegativeFloat = 1e-4
    norm_weight_decay: NonNegativeFloat | None = Field(None, description="null: as weight_decay")
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[Probability, ...] = Field((2 / 3, 8 / 9), description="fractions of steps; each divides by 10")
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    clip_norm: NonNegativeFloat = Field(0.0, description="largest gradient norm; 0 is off")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the weights' average; 0 is off")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    compile: bool = False
    log_every: PositiveInt = 50
    eval_every: Annotated[int, Field(ge=0)] = Field(5000, description="steps; 0: only at the end")
    checkpoint_every: PositiveInt = 1000
    eval_batch: PositiveInt = 8


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
