"""Putting adapters into a model: which modules a config names, what replaces them, and the model without them."""
