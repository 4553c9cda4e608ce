"""Forwards like those in layers.py, for base layers quantised by bitsandbytes. PEFT merges them, with rounding."""

from __future__ import annotations

from peft.tuners.lora import bnb as peft_layers

from lora_ext.integrations.peft.linear import LinearForward


class Linear8bitLt(LinearForward, peft_layers.Linear8bitLt):
    """Over ``bitsandbytes.nn.Linear8bitLt``."""


class Linear4bit(LinearForward, peft_layers.Linear4bit):
    """Over ``bitsandbytes.nn.Linear4bit``."""
