"""What the whole package uses: types of arguments, a lock for each model, warnings, text in messages."""
