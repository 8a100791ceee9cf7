"""Recordings that come with the agent; made by `scripts/scenarios.py`."""
