"""Helpers of the whole package: argument types, the lock for model changes, warnings, text in messages, progress."""
