"""Adapter directories in PEFT's format; safe reading of foreign files, and atomic writing.

- Adapters of a model: ``save_load``, ``save_pretrained``, ``hub``. An adapter's content (``adapter_content``) may have
  ``base_layers``, the ``packed_projection`` form, an ``expert_layout``; ``part_config`` describes a part of a model;
  ``misfits`` lists what does not fit; ``method_note`` says of which method an adapter is a part.
- Low level: ``reading`` of what strangers wrote, ``writing`` of files that are whole or absent.
- Before them: ``adapter_file`` on ``safetensors_format``, ``opened_file``, ``shard_index``,
  ``untrusted_json``, ``file_bytes`` and ``regular_file``.
- Writing: ``staged_files`` replaces several files together; ``held_file`` lets one process write.
"""

from lora_ext.files.held_file import held
from lora_ext.files.method_note import METHOD_FILE, read_method_note
from lora_ext.files.regular_file import open_regular
from lora_ext.files.untrusted_json import parse_json_object, read_json_object

__all__ = ["METHOD_FILE", "held", "open_regular", "parse_json_object", "read_json_object", "read_method_note"]
