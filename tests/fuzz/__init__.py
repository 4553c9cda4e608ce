"""Fuzzers: malformed and extreme calls of everything public, in separate processes; see `make fuzz` and README.md."""
