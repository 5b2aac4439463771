"""Backbone, anchors and the two heads."""
