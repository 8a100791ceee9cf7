"""The fleet over MQTT: names and payloads that devices and controllers share, and the receiving side."""
