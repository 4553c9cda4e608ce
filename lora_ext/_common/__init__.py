"""Helpers of the whole package: argument types, the lock for model changes, text in messages, warnings, progress."""
