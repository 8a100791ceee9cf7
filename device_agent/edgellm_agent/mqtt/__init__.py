"""The device's side of the fleet: what it tells a broker, and what it takes from one."""
