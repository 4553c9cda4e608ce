"""Merging adapters into weights and taking them out again to the bit: of weights, of layers, of a whole model."""
