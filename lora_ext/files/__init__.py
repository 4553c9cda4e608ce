"""Adapter directories in PEFT's format, and reading and writing files that may be bad, large or interrupted."""

from lora_ext.files.regular_file import open_regular
from lora_ext.files.untrusted_json import parse_json_object, read_json_object

__all__ = ["open_regular", "parse_json_object", "read_json_object"]
