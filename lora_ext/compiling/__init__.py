"""Graphs of compiled models, changed before a compiler sees them."""

from lora_ext.compiling.backend import SharingBackend, share_inputs

__all__ = ["SharingBackend", "share_inputs"]
