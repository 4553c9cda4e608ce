"""Modules that hold a frozen base layer and its adapters."""

from .linear import LoraAdapter, LoraLinear

__all__ = ["LoraAdapter", "LoraLinear"]
