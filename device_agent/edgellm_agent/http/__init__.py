"""OpenAI's HTTP API over the engine, health and Prometheus metrics: for clients that speak nothing else."""
