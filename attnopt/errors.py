"""The one exception that stands for a mistake of the user, and other errors in one line."""


class UserError(Exception):
    """A mistake that its maker can mend: the message is one line and says how.

    The command line prints ``error: <message>`` and exits with status 2, without a traceback.
    """


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
