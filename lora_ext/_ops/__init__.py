"""Registers each op's fake kernel, autograd and autocast: a file for each op. csrc/schemas.h has the schemas."""

from lora_ext._ops import delta, flops, grouped, linear, merge, shrink_expand, siblings  # noqa: F401
