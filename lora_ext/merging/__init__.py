"""Merging adapters into weights and restoring every bit: for weights, layers and whole models."""
