"""``lora-ext plan``: the memory and disk a method takes."""
