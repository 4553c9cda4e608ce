"""Helpers of the whole package: argument types, the lock for model changes, names and expressions, text, progress."""
