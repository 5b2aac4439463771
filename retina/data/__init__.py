"""From COCO files on disk to batches of tensors: annotations and images (coco), augmentation, batches (loader).

Nothing here knows the network, anchors or losses. The module docstrings of coco.py and loader.py list which images and
boxes are dropped, ignored or refused.
"""

from retina.data.annotations import DataError
from retina.data.coco import CocoDataset, Record, read_image
from retina.data.loader import Batch, Target, eval_batches, train_batches

__all__ = ["Batch", "CocoDataset", "DataError", "Record", "Target", "eval_batches", "read_image", "train_batches"]
