"""``lora-ext finetune``: fine-tunes a text classifier.

- ``run`` is the whole task, ``settings`` what it may be told (``defaults``, ``lora_targets``, ``extra_arguments``).
- Data: ``data`` reads and splits files (``sides``), ``task_data`` encodes them; ``demo`` has the demo's.
- The model: ``task_model`` loads and adapts it, with ``pooling``, ``quantize`` and ``vocabulary`` if asked to.
- Training: ``trainer``, ``trainer_callbacks``, ``training_arguments``, ``moving_average``; ``run_checkpoints`` and
  ``run_progress`` are what a resumed run continues from; ``busy_machine`` warns.
- Results: ``selection`` of the weights, ``scores``, ``results``, ``trained_files``.
"""
