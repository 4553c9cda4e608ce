"""Integrations of lora_ext's ops into other libraries. A module needs its library, so it is imported explicitly."""
