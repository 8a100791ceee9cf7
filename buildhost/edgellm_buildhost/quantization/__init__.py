"""From the float weights of a layer to quantized ones: grids, methods, and what they ask of calibration."""
