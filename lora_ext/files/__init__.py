"""Adapter directories in PEFT's format; safe reading of foreign files, and writing of files that are whole or absent.

- Adapters of a model: ``save_load``, ``save_pretrained``, ``hub``. ``adapter_file`` reads an adapter's config and
  tensors, ``adapter_content`` writes them. They may have ``base_layers`` or the ``packed_projection`` form; ``misfits``
  lists what does not fit a model.
- Low level: ``reading`` of what strangers wrote, ``writing`` of files that are whole or absent.
"""
