"""``lora-ext plan``: predicts the memory and disk that a method takes."""
