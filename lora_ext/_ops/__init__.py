"""Registers each op's fake kernel, autograd and autocast. csrc/schemas.h has the schemas.

- ``registration``: what PyTorch is told of an op, the same for all. ``linear``, ``grouped``, ``shrink_expand`` and
  ``merge`` call it, each for a family of ops. ``bottleneck`` and ``dora`` are made of ops.
- ``plain``, ``plain_grouped``: the ops in plain PyTorch, for torch.func, forward mode, gradients of gradients, and for
  float32 and float64 on CUDA.
- ``fast_path``: questions about a call. ``in_place``: what autograd must know of a change.
- ``checks`` refuses in traced graphs what csrc/bindings refuses in calls; ``errors`` turns an error of PyTorch or of an
  op into one that names the argument.
- ``flops`` counts operations.

The typed functions of the ops are in lora_ext/functional.py.
"""

from lora_ext._ops import flops, grouped, linear, merge, shrink_expand  # noqa: F401

flops.register_formulas()
