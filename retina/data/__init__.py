"""From COCO files on disk to batches of tensors: annotations and images (coco), augmentation, batches (loader).

Nothing here knows the network, anchors or losses. The module docstrings of coco.py and loader.py list which images and
boxes are dropped, ignored or refused. annotations.py needs no torch, so this file imports nothing.
"""
