"""What a user types: on a terminal with line editing and history, from a pipe in silence."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from maestrale.cli.history import History, history_path
from maestrale.errors import UsageError

FENCE = '"""'
Read = Callable[[], str | None]


def is_open(text: str) -> bool:
    """Whether `text` begins with three quotes that nothing has closed yet: more lines belong to it."""
    text = text.strip()
    return text.startswith(FENCE) and not (len(text) >= 2 * len(FENCE) and text.endswith(FENCE))


def unfenced(text: str) -> str:
    """What stands between three quotes and three quotes; any other text as it is."""
    inner = text.strip()
    fenced = inner.startswith(FENCE) and not is_open(text)
    return inner[len(FENCE) : -len(FENCE)].strip("\n") if fenced else text


@contextmanager
def lines(words: Sequence[str], status: Callable[[], str]) -> Iterator[Read]:
    """A function that gives what is typed next, None when there is no more or the user leaves. Several lines come
    as one between three quotes.

    words: what Tab completes at the beginning of a line. status: a line to be shown below the prompt. UsageError on a
    terminal where the extra is not installed.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused as a request, in one line
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield _from_pipe
        return
    if find_spec("prompt_toolkit") is None:
        raise UsageError("a conversation at the terminal needs prompt_toolkit: run  pip install 'maestrale[chat]'")
    history = History(history_path())
    try:
        yield _from_terminal(history, words, status)
    finally:
        history.close()


def _from_pipe() -> str | None:
    read = [sys.stdin.readline()]
    while is_open("".join(read)) and read[-1]:
        read.append(sys.stdin.readline())
    text = "".join(read)
    return unfenced(text.removesuffix("\n")) if text else None


def _from_terminal(history: History, words: Sequence[str], status: Callable[[], str]) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.shortcuts import CompleteStyle
    from prompt_toolkit.styles import Style

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        FormattedText([("class:prompt", "> ")]),
        history=InMemoryHistory(history.entries),
        multiline=Condition(lambda: is_open(get_app().current_buffer.document.text)),
        prompt_continuation=FormattedText([("class:more", "… ")]),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=keys,
        bottom_toolbar=lambda: FormattedText([("class:status", status())]),
        style=Style.from_dict(
            {"prompt": "bold ansicyan", "more": "ansicyan", "bottom-toolbar": "noreverse", "status": "ansibrightblack"}
        ),
    )

    def read() -> str | None:
        while True:
            try:
                text = session.prompt()
            except KeyboardInterrupt:
                if session.default_buffer.text:
                    continue  # Ctrl-C first takes back what was typed
                return None
            except EOFError:
                return None
            history.add(text)
            return unfenced(text)

    return read
