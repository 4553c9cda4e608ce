"""Adapters and checkpoints on disk, without a model: merge, unmerge, extract, inspect, diff. Nothing is read whole."""
