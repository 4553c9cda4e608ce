"""Adapter directories in PEFT's format; safe reading of foreign files, and atomic writing."""

from lora_ext.files.held_file import held
from lora_ext.files.regular_file import open_regular
from lora_ext.files.untrusted_json import parse_json_object, read_json_object

__all__ = ["held", "open_regular", "parse_json_object", "read_json_object"]
