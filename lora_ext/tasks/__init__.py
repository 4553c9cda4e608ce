"""What the command line runs. Uses the library's public API and is never imported by it."""


class TaskError(Exception):
    """A mistake the user can mend; the command line prints the message without a traceback."""
