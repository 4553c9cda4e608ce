"""Adapter directories in PEFT's format, and reading and writing files that may be bad, large or interrupted."""
