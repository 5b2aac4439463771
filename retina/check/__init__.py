"""Checks a data set before a training: defects of annotations and images, and how the anchors fit the objects."""

from retina.check.data_check import DataCheck, check_data, quick_check
from retina.check.page import write_page
from retina.check.text import format_check

__all__ = ["DataCheck", "check_data", "format_check", "quick_check", "write_page"]
