"""Low-Rank Adaptation of PyTorch models in fused kernels. README.md shows how to use it."""

# _load comes first: it registers torch.ops.lora_ext, or raises with the reason.
from lora_ext import _load, _ops  # noqa: F401
from lora_ext.adapters import (
    add_weighted_adapter,
    delete_adapter,
    disable_adapters,
    merge,
    merge_and_unload,
    set_adapter,
    unmerge,
)
from lora_ext.adapters.pool import AdapterPool
from lora_ext.config import LoraConfig
from lora_ext.files import save_pretrained  # noqa: F401  what save_pretrained of an injected model does
from lora_ext.files.save_load import load_adapter, save_adapter
from lora_ext.injection.inject import inject

__version__ = _load.build_info()["version"]

__all__ = [
    "AdapterPool",
    "LoraConfig",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapters",
    "inject",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "save_adapter",
    "set_adapter",
    "unmerge",
]
