"""Rows of a batch that choose their adapters (``adapter_names``), as the caller of a model sees it.

:mod:`lora_ext.nn.rows` is what the layers make of a choice.

- ``choose_adapters`` makes a choice of the names, or says why the model cannot serve it (``obstacles``). ``arguments``
  reads a call's arguments, ``adapter_lengths`` names for parts of a row, ``invocations`` where an aLoRA begins to act.
- Ways to name adapters: ``calls`` (of the model), ``generate``, ``continuous_batching`` (checked by
  ``batching_support``). ``serve_names`` gives them to a model, some by a ``replaced_method``.
"""
