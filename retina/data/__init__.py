"""From COCO files on disk to batches of tensors: reading and augmenting. Knows no network."""

from retina.data.coco import CocoDataset, DataError, Record
from retina.data.loader import Batch, Target, eval_batches, train_batches

__all__ = ["Batch", "CocoDataset", "DataError", "Record", "Target", "eval_batches", "train_batches"]
