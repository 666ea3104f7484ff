"""`maestrale interactive`: a prompt, a reply, and again."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from maestrale.cli import options as opt
from maestrale.cli.history import History, history_path
from maestrale.errors import RequestError

if TYPE_CHECKING:
    from maestrale.llm import LLM
    from maestrale.sampling.params import SamplingParams

_COMMANDS = "/clear starts anew, /help shows this, /quit leaves; Ctrl-C stops a reply, at the prompt it leaves"


def interactive(
    path: opt.Model = None,
    instruct: Annotated[
        bool, typer.Option("--instruct", help="A chat with an instruct model, not a text to go on with.")
    ] = False,
    max_tokens: opt.MaxTokens = 256,
    temperature: opt.Temperature = 0.7,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 0.95,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    seed: opt.Seed = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    num_pipeline_ranks: opt.PipelineRanks = None,
    tensor_parallel: opt.TensorParallel = None,
    expert_parallel: opt.ExpertParallel = 1,
    max_len: opt.MaxLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
) -> None:
    """Write a text with the model, line by line; with --instruct, talk with it.

    Each line is added to the text, and the model goes on from there; an empty line lets it go on. /help lists the
    commands.
    """
    from maestrale.sampling.params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    llm = opt.open_llm(
        path,
        dtype=dtype,
        device=device,
        backend=backend,
        num_pipeline_ranks=num_pipeline_ranks,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        max_len=max_len,
        max_batch_tokens=max_batch_tokens,
        ignore_unexpected=ignore_unexpected,
    )
    conversation: Text | Chat = Chat(llm, params) if instruct else Text(llm, params)
    if instruct:
        llm.tokenizer.encode_chat([{"role": "user", "content": ""}])  # a tokenizer without a chat form is told now
    with _lines() as read:
        while (line := read()) is not None:
            if line.startswith("/"):
                if line.strip() == "/quit":
                    break
                if line.strip() == "/clear":
                    conversation.clear()
                else:
                    print(_COMMANDS if line.strip() == "/help" else f"{line.strip()}: no such command; {_COMMANDS}")
                continue
            try:
                conversation.reply(line)
            except RequestError as error:
                print(f"maestrale: {error}", file=sys.stderr)


class Text:
    """One text that the user and the model write in turns."""

    def __init__(self, llm: LLM, params: SamplingParams):
        self.llm, self.params = llm, params
        self.ids: list[int] = []  # not text: a reply may end in the middle of a character

    def clear(self) -> None:
        self.ids = []

    def reply(self, line: str) -> None:
        """Goes on after `line`. RequestError leaves the text as it was."""
        ids = self._with(line) if line else self.ids
        if ids:
            _require_room(self.llm, ids)
            self.ids = [*ids, *say(self.llm, ids, self.params, "[the text ends here: /clear starts anew]").token_ids]

    def _with(self, line: str) -> list[int]:
        """The text and then `line`, a space between the two where neither has one."""
        text = self.llm.tokenizer.decode(self.ids)
        gap = " " if text and not (text[-1].isspace() or line[0].isspace()) else ""
        return self.llm.tokenizer.encode(text + gap + line)


class Chat:
    """Messages of a user and the assistant."""

    def __init__(self, llm: LLM, params: SamplingParams):
        self.llm, self.params = llm, params
        self.messages: list[dict[str, str]] = []

    def clear(self) -> None:
        self.messages = []

    def reply(self, line: str) -> None:
        """Answers `line`. RequestError leaves the messages as they were."""
        if not line.strip():
            return
        messages = [*self.messages, {"role": "user", "content": line}]
        ids = self.llm.tokenizer.encode_chat(messages)
        _require_room(self.llm, ids)
        said = say(self.llm, ids, self.params, reply=True)
        self.messages = [*messages, {"role": "assistant", "content": said.text}]


@dataclass
class Said:
    """What was printed of a reply."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)


def say(llm: LLM, ids: Sequence[int], params: SamplingParams, ended: str = "", reply: bool = False) -> Said:
    """Prints the continuation as it comes, until it ends or Ctrl-C is pressed.

    ended: to be printed where the model itself ended its text.
    """
    said, reason = Said(), None
    stream = llm.stream(ids, params, reply=reply)
    with _interruptible() as interrupted:
        for piece in stream:
            print(piece.text, end="", flush=True)
            said.text += piece.text
            said.token_ids += piece.token_ids
            reason = piece.finish_reason
            if interrupted():
                break
        stream.close()  # type: ignore[attr-defined]  # its pages are free from here on
    print()
    if reason == "length" and len(said.token_ids) < params.max_tokens:
        print(f"[the context of {llm.max_len} tokens is full: /clear starts anew]")
    elif reason == "stop" and ended:
        print(ended)
    return said


def _require_room(llm: LLM, ids: Sequence[int]) -> None:
    if len(ids) >= llm.max_len:
        raise RequestError(
            f"{len(ids)} tokens with this line, and the context holds {llm.max_len}, reply included: nothing was "
            "added; write less, or /clear to start anew",
            "prompt",
        )


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, a first Ctrl-C is noted, to be asked for between two tokens: an exception in the middle of a step
    would leave the cache's books half written. A second one ends the program."""
    noted = False
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _lines() -> Iterator[Callable[[], str | None]]:
    """A function that gives the next line without its end, None when there is none or the user leaves.

    On a terminal with a prompt, line editing and history; from a pipe in silence.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused as a request, in one line
    history = History(history_path()) if terminal else None
    if terminal:
        print(_COMMANDS)

    def read() -> str | None:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt) as end:
            if terminal:
                print()
            elif isinstance(end, KeyboardInterrupt):
                raise
            return None
        if history:
            history.add(line)
        return line

    try:
        yield read
    finally:
        if history:
            history.close()
