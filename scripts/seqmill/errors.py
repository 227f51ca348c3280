"""The one exception that means: the user can act on this message."""


class SeqmillError(Exception):
    """A mistake in the input, the configuration or the files, told in one sentence.

    Command-line programs print its message without a traceback and exit with code 1.
    """
