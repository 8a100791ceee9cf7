"""Calibration: a text goes through the model layer by layer, and what enters each linear is summed up."""
