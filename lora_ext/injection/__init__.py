"""Injecting adapters into a model: finding the modules that a config names, and replacing them.

- ``inject``: the order of it all, and how it is undone. ``targets`` finds what a config names, by PEFT's rules;
  ``build`` refuses what cannot be adapted, and makes the layers.
- ``all_linear``: what "all-linear" means, also in a mixture of experts.
- ``trainers``: refuses PEFT, and TRL's trainers that need a reference model, on an injected model.
"""
