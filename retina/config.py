"""The one source of defaults: every setting of a run with its type, its default and the values it accepts.

`Config` is frozen and has one section for each part of the program. config_file.py reads it from YAML and the command
line. A new setting is a new field here and a line in tests/study/defaults.json. This file never imports torch. Where
published RetinaNets differ, the description of the field names who uses which value.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from omegaconf import OmegaConf
from pydantic import Field, field_validator, model_validator

from retina.config_section import FilePath, NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Section

# In the folder of a generated data set; it identifies the data.
SHAPES_MANIFEST = "manifest.json"
# The twelve numbers of pycocotools, in its order.
CocoMetric = Literal["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
COCO_METRICS: tuple[str, ...] = get_args(CocoMetric)
Backbone = Literal[
    "resnet10",  # half of resnet18; no pretrained weights
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
]  # fmt: skip


class Data(Section):
    """COCO-format files. `num_classes` and the names come from the training annotations, not from the config."""

    train_annotations: FilePath = "data/coco/annotations/instances_train2017.json"
    train_images: FilePath = "data/coco/train2017"
    val_annotations: FilePath = "data/coco/annotations/instances_val2017.json"
    val_images: FilePath = "data/coco/val2017"
    short_side: tuple[PositiveInt, ...] = Field((800,), min_length=1, description="px; each image has a random one")
    eval_short_side: PositiveInt | None = Field(None, description="px; null: the last of short_side")
    max_side: PositiveInt = 1333
    resize: Literal["opencv", "opencv_bilinear", "pillow", "torchvision"] = Field(
        "opencv",
        description="opencv: area when shrinking, else bilinear; opencv_bilinear: mmdetection; pillow: bilinear with "
        "antialiasing, detectron2; torchvision: bilinear on floats",
    )
    normalization: Literal["imagenet", "caffe_bgr"] = Field(
        "imagenet",
        description="imagenet: RGB, mean and deviation of ImageNet: torchvision, mmdetection; caffe_bgr: BGR in 0..255 "
        "minus the mean: paper, detectron2",
    )
    pad_multiple: PositiveInt = Field(
        16, description="px; torchvision, mmdetection, detectron2: 32; 128 gives fewer batch shapes"
    )
    flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    zoom: tuple[PositiveFloat, PositiveFloat] = Field(
        (1.0, 1.0), description="range of the random scale; above 1 crops a window, and boxes outside of it are dropped"
    )
    photometric: Probability = Field(0.0, description="probability of a change of brightness, contrast, color")
    empty_images: Literal["keep", "drop"] = Field(
        "keep", description="images without objects; drop: detectron2, mmdetection"
    )
    crowd: Literal["ignore", "drop"] = Field("ignore", description="crowd regions; drop: torchvision, detectron2")
    sampling: Literal["uniform", "repeat_factor"] = Field(
        "uniform", description="repeat_factor: images of rare classes several times per epoch (LVIS), see sampling.py"
    )
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.001,
        description="of repeat_factor: images of a class that is in a smaller share of the images are repeated; "
        "0.001: LVIS, with 1,203 classes. With few classes choose it above the shares of the rare ones",
    )
    unreadable: Literal["error", "skip"] = Field(
        "error", description="an image file that cannot be used; skip: it adds nothing to the loss"
    )
    workers: Annotated[int, Field(ge=0)] = 2
    cache: FilePath | None = Field(
        None, description="folder for the decoded images of a small data set, 3 bytes per pixel; null: no cache"
    )
    shapes: FilePath | None = Field(
        None, description="settings file, from the current folder, of a generated data set, which is made where missing"
    )

    @property
    def shapes_root(self) -> Path | None:
        """The folder of the generated data set, the one above that of the annotations; None for other data."""
        return None if self.shapes is None else Path(self.train_annotations).parent.parent

    @field_validator("zoom")
    @classmethod
    def _zoom_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first number must not be above the second")
        return value


class Model(Section):
    backbone: Backbone = "resnet50"
    weights: FilePath | None = Field(
        "IMAGENET1K_V1",
        description="a torchvision weights name (IMAGENET1K_V1, COCO_V1, ...), a file, or null",
    )
    base_channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        64, description="width of the first stage of resnet10; the others have 64"
    )
    stride_in_1x1: bool = Field(
        False,
        description="stride of a bottleneck in its first convolution, not the 3x3; true: paper, detectron2, caffe",
    )
    norm: Literal["frozen", "frozen_stats", "batch", "group"] = Field(
        "frozen",
        description="of the backbone; frozen: paper, torchvision V1; frozen_stats (scale and shift train): mmdetection",
    )
    norm_eps: NonNegativeFloat = Field(1e-5, description="torchvision's published V1 weights need 0")
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = Field(
        1, description="-1 trains all, 0 freezes the stem, 1 the stem and layer1, ... (counted as in mmdetection)"
    )
    channels: Annotated[int, Field(ge=8, multiple_of=8)] = Field(256, description="width of the FPN and of both heads")
    p6_from: Literal["c5", "p5"] = Field("c5", description="input of P6; p5: torchvision V1")
    relu_before_p7: bool = Field(True, description="false: mmdetection")
    head_convs: Annotated[int, Field(ge=0)] = 4
    head_norm: Literal["none", "group"] = "none"
    prior: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="initial probability of each class; pi in section 4.1 of the paper"
    )

    @model_validator(mode="after")
    def _backbone_fits(self) -> Self:
        if self.base_channels != 64 and self.backbone != "resnet10":
            raise ValueError(f"base_channels {self.base_channels}: only resnet10 takes another width than 64")
        if self.stride_in_1x1 and not self.backbone.startswith(("resnet50", "resnet101", "resnet152", "resnext")):
            raise ValueError(f"stride_in_1x1: {self.backbone} has no bottlenecks")
        if self.norm == "group" and self.base_channels % 32:
            raise ValueError(f"norm group has 32 groups: base_channels {self.base_channels} is not a multiple of 32")
        return self


class Anchors(Section):
    octave_base: PositiveFloat = Field(4.0, description="anchor side / stride at the first scale")
    scales: PositiveInt = Field(3, description="per octave")
    ratios: tuple[PositiveFloat, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height / width")
    quantize: bool = Field(False, description="integer sizes, rounded corners: torchvision")
    stride: Literal["level", "padded"] = Field("level", description="padded: image size // grid size, torchvision")
    offset: Probability = Field(0.0, description="offset of the centers in strides; about 0.5 in the paper")


class Assign(Section):
    positive_iou: Probability = 0.5
    negative_iou: Probability = 0.4
    low_quality: Literal["keep", "overwrite", "none"] = Field(
        "keep",
        description="the best anchors of a box below positive_iou, see assign.py; overwrite: mmdetection, none: odtk",
    )
    padding: Literal["negative", "ignore"] = Field(
        "negative",
        description="anchors in the padding; ignore: mmdetection, where it begins at the next multiple of 32 px",
    )

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou} must not be above positive_iou {self.positive_iou}")
        return self


class Loss(Section):
    """The loss functions are in losses/; criterion.py chooses them by `cls` and `box`."""

    cls: Literal["focal", "focal_star", "ohem", "ohem_1_3"] = Field(
        "focal", description="focal_star: FL* of appendix A; ohem: online hard example mining, table 1d"
    )
    alpha: Probability | None = Field(0.25, description="weight of positives, 1 - alpha of negatives; null: no weights")
    gamma: NonNegativeFloat = 2.0
    beta: float = Field(1.0, description="used by focal_star only")
    ohem_batch: PositiveInt = Field(128, description="anchors per image; used by ohem and ohem_1_3 only")
    ohem_nms: Probability = Field(0.5, description="used by ohem and ohem_1_3 only")
    # CONTRIBUTING.md says how to add a box loss.
    box: Literal["smooth_l1", "l1", "giou"] = Field("smooth_l1", description="l1: mmdetection, torchvision V1")
    smooth_l1_beta: PositiveFloat = Field(0.11, description="used by smooth_l1 only")
    cls_weight: NonNegativeFloat = 1.0
    box_weight: NonNegativeFloat = 1.0
    normalizer: Literal["batch", "image", "ema"] = Field("batch", description="image: torchvision; ema: detectron2")
    ema_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    ema_start: PositiveFloat = 100.0

    @model_validator(mode="after")
    def _cls_has_what_it_needs(self) -> Self:
        if self.cls == "focal_star" and self.gamma == 0:
            raise ValueError("cls focal_star needs a gamma above 0")
        if self.cls == "ohem_1_3" and self.ohem_batch < 4:
            raise ValueError(f"ohem_batch {self.ohem_batch}: ohem_1_3 needs at least 4, one positive and 3 negatives")
        return self


class Detect(Section):
    score_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.05
    candidates: PositiveInt = Field(1000, description="per level, before NMS")
    nms_iou: Probability = 0.5
    max_detections: PositiveInt = 100
    clip: Literal["before_nms", "after_nms"] = Field("before_nms", description="to the image; after_nms: detectron2")
    empty_boxes: Literal["keep", "drop"] = Field(
        "keep", description="boxes without area when clipped; drop: detectron2, mmdetection"
    )
    max_ratio: Annotated[float, Field(gt=1)] = Field(
        62.5, description="largest box side / anchor side, 1000 / 16; used by losses on decoded boxes too"
    )
    tta_scales: tuple[PositiveFloat, ...] = Field(
        (0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375, 1.5),
        min_length=1,
        description="of the evaluation size, for tools/eval.py --tta; detectron2: 400, 500, ..., 1200 px for 800",
    )


class Train(Section):
    steps: PositiveInt = 90_000
    batch_size: PositiveInt = Field(16, description="images per step, over all processes and micro-batches")
    accumulate: PositiveInt = Field(1, description="micro-batches per step in each process")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = Field(0.01, description="for reference_batch images per step; scaled linearly with batch_size")
    reference_batch: PositiveInt = 16
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd only")
    weight_decay: NonNegativeFloat = 1e-4
    norm_weight_decay: NonNegativeFloat | None = Field(None, description="of norm layers; null: as weight_decay")
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[Probability, ...] = Field(
        (2 / 3, 8 / 9), description="of schedule steps: fractions; each divides by 10"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    clip_norm: NonNegativeFloat = Field(0.0, description="largest gradient norm; 0 is off")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the moving average (EMA) of the weights; 0 is off"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="auto: bf16 where the hardware supports it; fp32: on CUDA, convolutions in TF32 as torch does",
    )
    compile: bool = Field(False, description="torch.compile, for 15 to 30 seconds for each image size (ResNet-50)")
    log_every: PositiveInt = 50
    eval_every: Annotated[int, Field(ge=0)] = Field(5000, description="steps; 0: only after the last step")
    best_metric: CocoMetric = Field("AP", description="best.pt has the weights of the evaluation where it was highest")
    early_stop: Annotated[int, Field(ge=0)] = Field(0, description="ends after so many without a new best; 0 is off")
    checkpoint_every: PositiveInt = 1000
    keep: Literal["all", "weights"] = Field(
        "all", description="when the run has finished; weights: only last.pt, with the evaluated weights alone"
    )
    eval_batch: PositiveInt = 8


class Config(Section):
    """Every setting of a run. Its numbers depend on these, its files, the thread count and the hardware."""

    name: str = Field("retina", pattern=r"^[\w.-]+$")
    output_dir: FilePath = ""
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
        """The folder of a run with this configuration."""
        return Path(self.output_dir or f"runs/{self.name}")

    def flat(self) -> dict[str, Any]:
        """Every value by its key on the command line, `section.key`; tuples become lists."""
        values: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json").items():
            values |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        return values

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` and `config_from_yaml` read it back as an equal one."""
        return _yaml_of_json(self.model_dump_json())


@functools.lru_cache(maxsize=8)
def _yaml_of_json(text: str) -> str:
    """Remembered, because a run writes the same settings into each checkpoint."""
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(text)))
