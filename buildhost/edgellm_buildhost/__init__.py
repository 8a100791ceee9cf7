"""The build host: turns a checkpoint into the engine files that a device runs."""
