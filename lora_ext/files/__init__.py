"""Adapter directories in PEFT's format; safe reading of foreign files, and atomic writing."""
