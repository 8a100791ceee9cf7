"""The quality report: how far an engine is from the float model on a text that calibration never saw."""
