"""Registers each op's fake kernel, autograd and autocast. csrc/schemas.h has the schemas.

- A file for each family of ops: ``linear``, ``grouped``, ``shrink_expand``, ``merge``; ``bottleneck`` is made of two of
  them, ``dora`` of one. ``registration``, ``in_place`` and ``fast_path`` are what they share.
- Arguments: ``checks`` refuses in traced graphs what csrc/bindings refuses in calls; ``errors`` turns an error of
  PyTorch or of an op into one that names the argument.
- Typed functions: ``grouped_calls``; those of the other ops are in lora_ext/functional.py. ``call_arguments`` chooses
  arguments for their callers.
- ``composite``, ``composite_grouped``: the ops in plain PyTorch, for torch.func, forward mode and gradients of
  gradients; ``plain`` makes ops of them, for float32 and float64 on CUDA.
- ``nested``: nested tensors. ``flops`` counts operations.
"""

from lora_ext._ops import flops, grouped, linear, merge, plain, shrink_expand  # noqa: F401

flops.register_formulas()
