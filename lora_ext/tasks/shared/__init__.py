"""Code that several tasks share: whole files, result directories, models by id."""
