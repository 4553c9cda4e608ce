"""``lora-ext compare`` and ``lora-ext sweep``: many fine-tuning runs in one table.

- ``compare`` and ``sweep`` are the commands; ``method_spec`` parses what to compare; ``trimmed_base`` makes the
  checkpoint that all runs take.
- Running: ``many_runs`` keeps the order and the results, ``launch`` says where, ``pools`` executes: in ``processes`` of
  this machine (``preloaded``), or as ``submitit_jobs``.
- Figures: ``costs`` of a step, ``spread`` over seeds.
"""
