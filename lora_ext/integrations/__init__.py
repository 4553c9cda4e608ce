"""lora_ext beneath other libraries' adapters. Each module needs its library, and is imported by whoever uses it."""
