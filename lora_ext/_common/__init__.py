"""Used by the whole package: types of arguments, a lock for each model, warnings, text in messages, progress."""
