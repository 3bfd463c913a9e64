"""What the user of an experiment can put right: shown by the command line as one message, without a traceback."""


class UsageError(ValueError):
    """A mistake outside the program, such as a missing file; the message says what is wrong and how to cure it."""
