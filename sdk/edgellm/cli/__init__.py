"""The command line: one program, to which every package adds its commands."""
