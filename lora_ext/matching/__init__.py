"""Matching the names and regular expressions of a config with a model's paths, in bounded time."""
