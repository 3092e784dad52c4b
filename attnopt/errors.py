"""The one exception that stands for a mistake of the user."""


class UserError(Exception):
    """A mistake that its maker can mend: the message is one line and says how.

    The command line prints ``error: <message>`` and exits with status 2, without a traceback.
    """
