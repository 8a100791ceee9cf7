"""The build host's commands of the one CLI, one file each."""
