"""The adapters that a model holds, and the model as it is without them.

- ``adapter_set``: the configs of the adapters, which are active, and the model's own biases that they train.
- ``bare_model``: paths and modules without adapter layers.
- ``adapter_state``: the state of adapters and methods alone, and what ``load_state_dict`` takes.
- ``replaced_methods``: in place of a model's own, such as ``save_pretrained``.
- ``mixed_batch``: ``adapter_names`` in the model's calls.
"""
