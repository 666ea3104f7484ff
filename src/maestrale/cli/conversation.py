"""What has been said so far: a chat in turns, or one text that the user and the model write together.

Both answer the same questions, so that the terminal need not know which it has: what the model reads if `line` is said
now, what becomes of its reply, what a retry reads, and what a file keeps of it all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from maestrale.errors import RequestError
from maestrale.text.chat import read_messages
from maestrale.text.tokenizer import Tokenizer


class Conversation(Protocol):
    """replies: whether what the model says is a text of its own (`LLM.stream`'s reply). form: "chat" or "text"."""

    replies: bool
    form: str

    def prompt(self, line: str | None) -> list[int]:
        """What the model reads next, if `line` is said first; None leaves it as it stands. Changes nothing."""

    def add(self, line: str | None, text: str, token_ids: Sequence[int]) -> None:
        """`line`, if any, was said, and the model answered."""

    def take_back(self) -> bool:
        """Forgets the last reply; False where there is none."""

    def clear(self) -> None: ...

    def size(self) -> int:
        """Tokens of what has been said; 0 where nothing has."""

    def saved(self) -> dict[str, Any]:
        """For a JSON file."""

    def load(self, saved: Mapping[str, Any]) -> None:
        """RequestError for what `saved` cannot have given; then nothing is changed."""


class Chat:
    """Messages of a user and the assistant, after an optional system message."""

    replies, form = True, "chat"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.system = ""
        self.messages: list[dict[str, str]] = []

    def prompt(self, line: str | None) -> list[int]:
        return self._tokenizer.encode_chat(self._after(line, self._head() + self.messages))

    def add(self, line: str | None, text: str, token_ids: Sequence[int]) -> None:
        self.messages = [*self._after(line, self.messages), {"role": "assistant", "content": text}]

    def take_back(self) -> bool:
        said = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        if said:
            self.messages = self.messages[:-1]
        return said

    def clear(self) -> None:
        self.messages = []

    def size(self) -> int:
        return len(self.prompt("")) if self.messages else 0

    def saved(self) -> dict[str, Any]:
        return {"messages": self._head() + self.messages}

    def load(self, saved: Mapping[str, Any]) -> None:
        messages = saved.get("messages")
        if not isinstance(messages, list):
            raise RequestError('expected {"messages": [{"role": …, "content": …}, …]}', "messages")
        turns = read_messages([*messages, {"role": "user", "content": ""}])[:-1]
        if any(turn.calls or turn.answers for turn in turns):
            raise RequestError("messages: with tool calls, which a chat at the terminal cannot go on with", "messages")
        self.system = "\n\n".join(turn.text for turn in turns if turn.role == "system")
        self.messages = [{"role": turn.role, "content": turn.text} for turn in turns if turn.role != "system"]

    def _head(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    @staticmethod
    def _after(line: str | None, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return messages if line is None else [*messages, {"role": "user", "content": line}]


class Text:
    """One text; kept as ids, because a reply may end in the middle of a character."""

    replies, form = False, "text"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self._reply = 0  # tokens of the last reply, the end of `ids`

    def prompt(self, line: str | None) -> list[int]:
        """The text and then `line`, a space between the two where neither has one."""
        if line is None:
            return self.ids
        text = self._tokenizer.decode(self.ids)
        gap = " " if text and not (text[-1].isspace() or line[0].isspace()) else ""
        return self._tokenizer.encode(text + gap + line)

    def add(self, line: str | None, text: str, token_ids: Sequence[int]) -> None:
        self.ids = [*self.prompt(line), *token_ids]
        self._reply = len(token_ids)

    def take_back(self) -> bool:
        said = self._reply > 0
        self.ids = self.ids[: len(self.ids) - self._reply]
        self._reply = 0
        return said

    def clear(self) -> None:
        self.ids, self._reply = [], 0

    def size(self) -> int:
        return len(self.ids)

    def saved(self) -> dict[str, Any]:
        return {"text": self._tokenizer.decode(self.ids)}

    def load(self, saved: Mapping[str, Any]) -> None:
        text = saved.get("text")
        if not isinstance(text, str):
            raise RequestError('expected {"text": …}', "text")
        self.ids, self._reply = self._tokenizer.encode(text), 0
