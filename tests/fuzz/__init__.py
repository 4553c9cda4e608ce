"""Malformed and extreme calls of everything public, in processes of their own: `make fuzz`, docs/robustness.md."""
