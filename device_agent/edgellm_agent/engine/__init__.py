"""The engine as the agent sees it: a worker process, and a supervisor that keeps one running."""
