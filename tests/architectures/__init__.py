"""Architectures of transformers, adapted here and by PEFT: ``PYTHONPATH=tests python -m architectures --write``."""
