"""Injecting adapters into a model: finding the modules that a config names, and replacing them.

- ``inject``: the order of it all. ``targets`` finds what a config names, by PEFT's rules; ``check_targets`` refuses
  what cannot be adapted; ``build`` makes the layers.
- Special models: ``mixtures`` ("all-linear" in a mixture of experts), ``quantized_models``.
- Refusals of other libraries' calls: ``trainers``, ``diffusion_scale``.
"""
