"""The gRPC surface: each servicer translates, calls, translates, and has no logic of its own."""
