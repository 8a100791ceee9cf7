"""What all sides of edgellm share and a user holds: bundle, device profiles, memory plan, client, CLI."""
