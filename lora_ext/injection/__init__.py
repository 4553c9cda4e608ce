"""Injecting adapters into a model: finding the modules that a config names, and replacing them."""
