"""Every error a user can cause or meet, each with the exit code of the command line.

An error's message says what, where, expected, got and remedy in one line. The command line prints the
message alone and leaves with `exit_code`; a server turns a `RequestError` into a 4xx that names `param`.
"""

from reprlib import Repr


class MaestraleError(Exception):
    """The base of all of them: a message for people, no traceback needed."""

    exit_code = 1


class UsageError(MaestraleError):
    """A wrong option, or a combination of options that makes no sense."""

    exit_code = 2


class RequestError(MaestraleError):
    """A generation request that cannot be served; `param` names the offending field."""

    exit_code = 2

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class ConfigError(MaestraleError):
    """A model description (params.json, config.json) that is missing a value or holds an impossible one."""

    exit_code = 3


class CheckpointError(MaestraleError):
    """A weight or tokenizer file that is damaged, incomplete, unsafe or of the wrong shape."""

    exit_code = 3


class DataError(MaestraleError):
    """Training data with lines that cannot be used; the message names them."""

    exit_code = 3


class MemoryLimitError(MaestraleError):
    """Something does not fit into memory; the message says what would."""

    exit_code = 4


class OutOfPages(MemoryLimitError):
    """The cache has no free page: the scheduler answers by preempting a sequence."""


class DiskError(MaestraleError):
    """Too little space, or an output that cannot be written."""

    exit_code = 5


class DistributedError(MaestraleError):
    """A rank that died, hangs, or cannot do its part; the message names rank, host and cause."""

    exit_code = 6


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80
_SHORT.maxlevel = 2


def first_line(error: BaseException) -> str:
    """What a library's error says, for a message of one line; the error's kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def shown(value: object) -> str:
    """A wrong value for a message, cut where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python's limit on the digits of an integer
        return "a number of too many digits"


def one_line(text: str) -> str:
    """`text` with what does not print as escapes: names and values from files and clients can neither break a line nor
    steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


SIGINT_EXIT = 130
SIGTERM_EXIT = 143
