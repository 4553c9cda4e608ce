"""LoRA and the methods that its paper compares with, behind one interface, one file for each family.

``apply_method(model, new_method("adapter-h", bottleneck_size=16))`` adapts a Transformers model in place;
:func:`save_method` and :func:`load_method` store what was trained; ``method.count(model)`` is the paper's formula.
"""

from lora_ext.methods.adapted import apply_method, method_of, prepare_method, remove_method
from lora_ext.methods.architectures import ARCHITECTURES
from lora_ext.methods.base import Insertion, Method, head_parameter_count, head_parameters, pooling_of
from lora_ext.methods.files import load_method, read_method, save_method
from lora_ext.methods.pooling import POOLINGS, set_pooling
from lora_ext.methods.registry import METHODS, new_method, option_names

__all__ = [
    "ARCHITECTURES",
    "METHODS",
    "POOLINGS",
    "Insertion",
    "Method",
    "apply_method",
    "head_parameter_count",
    "head_parameters",
    "load_method",
    "method_of",
    "new_method",
    "option_names",
    "pooling_of",
    "prepare_method",
    "read_method",
    "remove_method",
    "save_method",
    "set_pooling",
]
