"""What a fleet desires of this device: the rules, the sources it may fetch from, the fetch, and commands."""
