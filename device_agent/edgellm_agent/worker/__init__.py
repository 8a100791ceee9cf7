"""The engine worker: a process of its own, so that the agent outlives what the engine does to it."""
