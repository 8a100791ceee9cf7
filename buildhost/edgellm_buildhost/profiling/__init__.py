"""Where the time of a step goes: an engine runs as in a device's worker, under ONNX Runtime's profiler."""
