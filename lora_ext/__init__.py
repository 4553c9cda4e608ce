"""Low-Rank Adaptation of PyTorch models in fused kernels. README.md shows how to use it."""

from . import _load  # first: registers torch.ops.lora_ext, or says loudly why it cannot

from . import _ops  # isort: skip
from .adapters import merge, unmerge
from .checkpoint import load_adapter, save_adapter
from .config import LoraConfig
from .inject import inject

__version__ = _load.build_info()["version"]

__all__ = ["LoraConfig", "inject", "load_adapter", "merge", "save_adapter", "unmerge"]
