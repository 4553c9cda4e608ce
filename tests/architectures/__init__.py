"""Architectures of transformers and diffusers, adapted here and by PEFT."""
