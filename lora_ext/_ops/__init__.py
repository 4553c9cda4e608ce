"""Registers each op's fake kernel, autograd and autocast. csrc/schemas.h has the schemas.

- A file for each family of ops: ``linear``, ``siblings``, ``grouped``, ``grouped_linear``, ``shrink_expand``,
  ``merge``; ``bottleneck`` is made of two of them, ``dora`` of one. ``registration``, ``in_place`` and ``usual_calls``
  are what they share.
- Arguments: ``checks`` and ``tensor_arguments`` refuse in traced graphs what csrc/bindings refuses in calls.
  ``refusals`` has the texts of csrc/refusals.h; ``errors`` turns an error of PyTorch or of an op into one that names
  the argument.
- Typed functions: ``grouped_calls``; those of the other ops are in lora_ext/functional.py. ``call_arguments`` chooses
  arguments for their callers.
- ``composite``: the ops in plain PyTorch, for torch.func, forward mode and gradients of gradients; ``plain`` makes ops
  of them, for float32 and float64 on CUDA.
- Kinds of tensors: ``nested``, ``lazy_views``. ``flops`` counts operations.
"""

from lora_ext._ops import flops, grouped, grouped_linear, linear, merge, plain, shrink_expand, siblings  # noqa: F401

flops.register_formulas()
