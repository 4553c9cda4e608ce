"""Merging adapters into weights and layers, and restoring every bit."""
