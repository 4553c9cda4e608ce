"""Rows of a batch, or tokens of a row, that choose their adapters (``adapter_names``), as the layers see it.

:mod:`lora_ext.model.rows` checks the names of a call and makes a choice of them.

- The choice: ``choice`` (a name for each row), ``packed`` (a name for some of the tokens), ``active_tokens`` (adapters
  that act from a token on). ``in_force`` says which one the layers find while the model runs; ``compiled`` refuses
  compiled code.
- What a layer computes by it: ``updates`` (one op for all adapters), ``split`` (the rows of each adapter apart).
- Storage for the adapters of a pool: ``layer_slots``, ``module_slots``.
"""
