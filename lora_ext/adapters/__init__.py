"""The public functions for the named adapters of a model, from this package and others."""

from lora_ext.adapters.combine import add_weighted_adapter
from lora_ext.adapters.hotswap import hotswap_adapter, prepare_hotswap
from lora_ext.adapters.life_cycle import (
    AdapterStatus,
    adapter_names,
    adapter_status,
    delete_adapter,
    disable_adapters,
    rename_adapter,
    set_adapter,
    trainable_parameter_counts,
)
from lora_ext.adapters.merge_model import merge, merge_and_unload, merge_errors, merge_record_bytes, unload, unmerge
from lora_ext.injection.inject import lora_modules
from lora_ext.nn.input_groups import InputGroups, input_groups

__all__ = [
    "AdapterStatus",
    "InputGroups",
    "adapter_names",
    "adapter_status",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapters",
    "hotswap_adapter",
    "input_groups",
    "lora_modules",
    "merge",
    "merge_and_unload",
    "merge_errors",
    "merge_record_bytes",
    "prepare_hotswap",
    "rename_adapter",
    "set_adapter",
    "trainable_parameter_counts",
    "unload",
    "unmerge",
]
