"""Fuzzing of all that takes bytes from strangers: `python -m tests.fuzz --help`."""
