"""The one error that is the user's to mend; imports nothing.

A command line shows the message alone, without a traceback, and exits with status 2.
"""


class InputError(ValueError):
    """Something the user gave (a file, a flag, a directory) cannot be used.

    The message is one sentence that names the thing, the value, and the remedy.
    """
