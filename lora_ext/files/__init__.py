"""Adapter directories in PEFT's format; safe reading of foreign files, and writing of files that are whole or absent.

- Adapters of a model: ``save_load``, ``save_pretrained``. ``adapter_file`` is the two files of an adapter.
- Adapters alone: ``contents`` sorts the keys of a file; ``normalising`` folds its scaling into the factors.
- Low level: ``reading`` of what strangers wrote, ``writing`` of files that are whole or absent.
"""
