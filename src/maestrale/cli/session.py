"""A conversation at the terminal: what is typed goes to the model or is a command, the reply is written as it comes."""

from __future__ import annotations

import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from maestrale.cli.commands import COMMANDS, run_command
from maestrale.cli.reading import lines
from maestrale.cli.writing import write_markdown, write_plain
from maestrale.errors import MaestraleError, RequestError, one_line
from maestrale.interrupts import noted

if TYPE_CHECKING:
    from maestrale.cli.conversation import Conversation
    from maestrale.llm import LLM
    from maestrale.sampling.params import SamplingParams


@dataclass
class Said:
    """What came of a reply. experts: [tokens][layers][K], of a mixture. seconds: since its first token."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    experts: list[list[list[int]]] = field(default_factory=list)
    reason: str | None = None
    interrupted: bool = False
    seconds: float = 0.0


class Session:
    """name: the model's, for the status line. plain: no Markdown, which only chats on a terminal have anyway.
    adapter: the name of one of the model's adapters, to go through."""

    def __init__(
        self,
        llm: LLM,
        name: str,
        conversation: Conversation,
        params: SamplingParams,
        plain: bool = False,
        adapter: str | None = None,
    ):
        self.llm, self.name, self.conversation, self.params = llm, name, conversation, params
        self.adapter = adapter
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        markdown = self.terminal and not plain and conversation.form == "chat"
        self.write = write_markdown if markdown else write_plain
        self.said: Said | None = None
        self.used = 0  # tokens of the context, the last reply included
        self.retries = 0  # in a row
        self.own_files: set[str] = set()  # that /save may replace

    def run(self) -> None:
        """Until there is nothing more to read, or the user leaves. What cannot be done is told in a line."""
        if self.terminal:
            print("/? lists the commands; Ctrl-C stops a reply; Ctrl-D leaves")
        with lines([f"/{name}" for name in COMMANDS], self.status) as read:
            while (line := read()) is not None:
                try:
                    if line.startswith("/"):
                        if not run_command(self, line):
                            return
                    elif line.strip():
                        self.reply(line)
                    elif self.conversation.form == "text" and self.conversation.size():
                        self.reply(None)  # the text goes on
                except MaestraleError as error:
                    print(f"maestrale: {one_line(str(error))}", file=sys.stderr)

    def reply(self, line: str | None, again: bool = False) -> None:
        """The model answers `line`, or goes on. RequestError leaves the conversation as it was."""
        self.retries = self.retries + 1 if again else 0
        ids = self.conversation.prompt(line)
        if len(ids) >= self.llm.max_len:
            raise RequestError(
                f"{len(ids)} tokens with this line, and the context holds {self.llm.max_len}, reply included: nothing "
                "was added; write less, or /clear to start anew",
                "prompt",
            )
        said = self.said = Said()
        with _no_echo() if self.terminal else nullcontext():
            self.write(self._texts(ids, said))
        self.conversation.add(line, said.text, said.token_ids)
        self.used = len(ids) + len(said.token_ids)
        if self.terminal:
            print()  # air before the next prompt
        if said.reason == "length" and len(said.token_ids) < self.params.max_tokens:
            print(f"[the context of {self.llm.max_len} tokens is full: /clear starts anew]")
        elif said.reason == "length" and self.terminal and self.conversation.form == "chat":
            print(f"[cut off after {self.params.max_tokens} tokens: /set max_tokens allows more]")
        elif said.reason == "stop" and self.conversation.form == "text":
            print("[the text ends here: /clear starts anew]")

    def retry(self) -> None:
        """Another reply to what was answered last."""
        if not self.conversation.take_back():
            raise RequestError("/retry: there is no reply yet", "retry")
        if self.params.temperature == 0:
            print("[at temperature 0 the reply is the same again: /set temperature 0.7]")
        self.reply(None, again=True)

    def status(self) -> str:
        rate = ""
        if self.said and self.said.seconds > 0:
            rate = f" · {(len(self.said.token_ids) - 1) / self.said.seconds:,.0f} tokens/s"
        return f"{self.name} · {self.used:,} of {self.llm.max_len:,} tokens{rate} · /? for help"

    def _texts(self, ids: list[int], said: Said) -> Iterator[str]:
        """The pieces of a reply, which `said` gathers, until it ends or Ctrl-C is pressed."""
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=params.seed + self.retries)  # a retry is another draw, and repeatable too
        stream = self.llm.stream(ids, params, reply=self.conversation.replies, adapter=self.adapter)
        started = None
        with noted() as interrupted:
            for piece in stream:
                started = started or (time.perf_counter() if piece.token_ids else None)
                said.text += piece.text
                said.token_ids += piece.token_ids
                said.experts += piece.experts or []
                said.reason = piece.finish_reason
                yield piece.text
                if interrupted():
                    said.interrupted = True
                    break
            stream.close()  # type: ignore[attr-defined]  # its pages are free from here on
        said.seconds = time.perf_counter() - started if started else 0.0


@contextmanager
def _no_echo() -> Iterator[None]:
    """Within, keys are not shown: they would stand in the middle of the reply, ^C too. What is typed is not lost."""
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
