"""Decides how much the engine may do, so that the board need not throttle by itself."""
