"""Malformed and extreme calls of all public functions, in separate processes: `make fuzz`."""
