"""The device agent: keeps engines, runs the active one in a worker, answers gRPC, reports telemetry."""
