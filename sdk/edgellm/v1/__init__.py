"""Messages and stubs generated from proto/edgellm/v1 by `make proto`."""
