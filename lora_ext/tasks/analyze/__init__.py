"""``lora-ext analyze``: what adapters learned."""
