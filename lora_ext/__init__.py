"""Low-Rank Adaptation of PyTorch models in fused kernels. README.md shows how to use it."""

from . import _load, _ops, _ops_delta, _ops_merge, _ops_shrink_expand, _ops_siblings  # noqa: F401  first _load: it registers torch.ops.lora_ext, or says loudly why it cannot
from .adapters import merge, set_adapter, unmerge
from .checkpoint import load_adapter, save_adapter
from .config import LoraConfig
from .inject import inject

__version__ = _load.build_info()["version"]

__all__ = ["LoraConfig", "inject", "load_adapter", "merge", "save_adapter", "set_adapter", "unmerge"]
