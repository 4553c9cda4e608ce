"""``lora-ext generate``: answers prompts with a decoder and its adapters."""
