"""The tasks of the command line. They use the library's public API; the library never imports them."""


class TaskError(Exception):
    """A mistake the user can mend; the command line prints the message without a traceback.

    Attributes:
        exit_status: of the command.
    """

    exit_status = 2


class WriteError(TaskError):
    """A result cannot be written: the disk is full, read-only, or not the user's. What was whole before still is."""

    exit_status = 1
