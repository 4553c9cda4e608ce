"""``lora-ext compare`` and ``lora-ext sweep``: many fine-tuning runs in one table."""
