"""What several tasks use: files written whole, result directories, models by their ids."""
