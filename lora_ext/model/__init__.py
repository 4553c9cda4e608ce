"""The adapters that a model holds, and the model as it is without them."""
