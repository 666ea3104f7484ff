"""What a user typed, kept from one run to the next for the arrow keys; readable by that user alone."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path

KEPT = 1000  # entries


def history_path() -> Path | None:
    """maestrale/history in $XDG_STATE_HOME, or in ~/.local/state; None for a user without a home."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        try:
            state = Path.home() / ".local" / "state"
        except RuntimeError:
            return None
    return state / "maestrale" / "history"


class History:
    """The last entries, and a file to which each new one is appended at once, so that a kill loses none.

    An entry is a line of the file; a line end within it is written \\n, a backslash \\\\. The file is opened once:
    mode 0600 whatever it was, and never through a link. A place that cannot be written is warned of, and nothing is
    kept.
    """

    def __init__(self, path: Path | None):
        self._file = -1
        self.entries: list[str] = []
        if path is None:
            warnings.warn("history is not kept: no home folder; set XDG_STATE_HOME", stacklevel=2)
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600)
            os.fchmod(self._file, 0o600)
            with open(self._file, encoding="utf-8", errors="replace", newline="\n", closefd=False) as file:
                lines = [line for line in file.read().split("\n") if line]
            if len(lines) > 2 * KEPT:
                os.ftruncate(self._file, 0)
                os.write(self._file, "".join(f"{line}\n" for line in lines[-KEPT:]).encode())
        except OSError as error:
            warnings.warn(f"{path}: history is not kept: {error.strerror or error}", stacklevel=2)
            return
        self.entries = [re.sub(r"\\([n\\])", lambda m: "\n" if m[1] == "n" else "\\", line) for line in lines[-KEPT:]]

    def add(self, entry: str) -> None:
        if self._file < 0 or not entry.strip():
            return
        line = entry.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", " ")
        with suppress(OSError):  # a full disk is no reason to end a conversation
            os.write(self._file, f"{line}\n".encode(errors="replace"))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
