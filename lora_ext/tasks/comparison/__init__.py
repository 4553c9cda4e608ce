"""``lora-ext compare`` and ``lora-ext sweep``: many runs side by side."""
