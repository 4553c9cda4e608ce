"""Names and regular expressions of a config, matched with a model's paths in bounded time."""
