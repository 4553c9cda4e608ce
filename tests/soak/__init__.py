"""Many threads, many adapters, for a long time."""
