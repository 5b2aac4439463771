"""The objects found in one image, in pixels of that image, and what they turn into for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retina.detect import Detections
from retina.model.weights import Categories


@dataclass(frozen=True, eq=False)  # == of tensors is not one truth value
class ImageDetections:
    """D objects in order of falling score; tensors on the CPU, boxes in pixels of the image that was given."""

    boxes: Tensor  # float32 (D, 4) xyxy
    scores: Tensor  # float32 (D,), 0..1
    labels: Tensor  # int64 (D,), 0..K-1
    names: list[str]  # of the class of each object
    category_ids: list[int]  # of the class of each object, as in the data set that the detector was trained on

    def __len__(self) -> int:
        return len(self.scores)

    def where(self, kept: Tensor) -> ImageDetections:
        """Those for which `kept`, bool (D,), is true. Raises ValueError for another dtype, such as positions."""
        if kept.dtype != torch.bool:
            raise ValueError(f"kept: given {kept.dtype}, expected torch.bool with one value for each object")
        places = kept.nonzero()[:, 0].tolist()
        return ImageDetections(
            self.boxes[kept],
            self.scores[kept],
            self.labels[kept],
            [self.names[i] for i in places],
            [self.category_ids[i] for i in places],
        )

    def coco_results(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results, as pycocotools reads them; boxes xywh, rounded to a thousandth of a pixel."""
        xywh = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], dim=1)
        entries = zip(self.category_ids, xywh.tolist(), self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category, "bbox": [round(v, 3) for v in box], "score": score}
            for category, box, score in entries
        ]

    def to_supervision(self) -> Any:
        """A `supervision.Detections` with the names as data["class_name"], which its annotators show.

        Raises ImportError, which says what to install, if `supervision` is missing.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )


def on_image(
    detections: Detections, size: tuple[int, int], image_size: tuple[int, int], categories: Categories
) -> ImageDetections:
    """Scale boxes from pixels of the network's input to pixels of the image, and name the classes.

    Args:
        detections: as `detect` returns them.
        size: (height, width) of the resized image without its padding.
        image_size: (height, width) of the image.
        categories: of each label.
    """
    boxes, scores, labels = scaled(detections, size, image_size)
    found = [categories[label] for label in labels.tolist()]
    return ImageDetections(boxes, scores, labels, [name for _, name in found], [category for category, _ in found])


def scaled(detections: Detections, size: tuple[int, int], image_size: tuple[int, int]) -> Detections:
    """With boxes in pixels of an image that was resized from `image_size` to `size`, both (height, width)."""
    scale = torch.tensor([image_size[1] / size[1], image_size[0] / size[0]] * 2)
    return detections._replace(boxes=detections.boxes * scale)
