"""``lora-ext finetune``: fine-tunes a text classifier."""
