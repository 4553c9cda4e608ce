"""The tasks of the command line. They use the library's public API; the library never imports them."""


class TaskError(Exception):
    """A mistake that the user can correct; the command line prints the message without a traceback.

    Attributes:
        exit_status: exit status of the command.
        is_alone: whether this process of several found it, and the first one did not.
    """

    exit_status = 2
    is_alone = False


class WriteError(TaskError):
    """A result cannot be written: the disk is full, read-only, or not the user's. Existing files stay complete."""

    exit_status = 1
