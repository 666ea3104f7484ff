"""`maestrale` and `python -m maestrale`: what Ctrl-C does before a verb begins and when all is done."""

import os
import signal


def main() -> None:
    _leave_at_once()
    from maestrale import cli

    try:
        cli.main()  # which gives Ctrl-C back to Python where there is something to tidy
    finally:
        _leave_at_once()


def _leave_at_once() -> None:
    """On SIGINT; where it is ignored, as in a shell's background, it stays so.

    Not by an exception: raised in a callback of the importer or a finalizer, Python shows it and goes on.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))  # errors.SIGINT_EXIT


if __name__ == "__main__":
    main()
