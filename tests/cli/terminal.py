"""The command line on a pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

from byte_models import ENVIRONMENT


class Terminal:
    """`maestrale VERB ARGS` on a pseudo-terminal. state: where the history is kept. term: what $TERM says."""

    def __init__(self, state, *args, term="dumb"):
        self.master, slave = pty.openpty()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "maestrale", *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=ENVIRONMENT | {"XDG_STATE_HOME": str(state), "TERM": term, "PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # where Ctrl-C goes to
        )
        os.close(slave)

    def read_until(self, mark, seconds=60):
        """What came up to `mark`, which is the end of what has been read; without colours and cursor movements."""
        end = time.monotonic() + seconds
        while mark not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{mark!r} did not come, but {self.seen!r}"
            try:
                self.seen = re.sub(rb"\x1b\[[?0-9;]*[A-Za-z]", b"", self.seen + os.read(self.master, 4096))
            except OSError:  # the other side is closed
                raise EOFError(f"{mark!r} did not come, but {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(mark)
        return before

    def read_until_prompt(self):
        """What came up to the next prompt that takes keys; before, the terminal itself would read Ctrl-D and Ctrl-C."""
        before = self.read_until(b"\n> ")
        while termios.tcgetattr(self.master)[3] & termios.ICANON:
            time.sleep(0.01)
        return before

    def type(self, keys):
        os.write(self.master, keys)

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
