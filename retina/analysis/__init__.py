"""What detections are worth: matches, AP with intervals, comparison of runs. Imports no torch."""
