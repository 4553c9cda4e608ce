"""Subclasses like those in layers.py, for base layers quantised by bitsandbytes."""

from __future__ import annotations

from peft.tuners.lora import bnb as peft_layers

from lora_ext.integrations.peft.linear import LinearForward
from lora_ext.integrations.peft.merging import ExactMerging


class Linear8bitLt(LinearForward, ExactMerging, peft_layers.Linear8bitLt):
    """Over ``bitsandbytes.nn.Linear8bitLt``."""


class Linear4bit(LinearForward, ExactMerging, peft_layers.Linear4bit):
    """Over ``bitsandbytes.nn.Linear4bit``."""
