"""Calls of tools in what a model says: the form of each tokenizer version, as a grammar to hold the model to, and as a
reader that takes them out of the ids as they come.

Up to v10, after [TOOL_CALLS]: a JSON list of {"name": …, "arguments": {…}, "id": …}, spaced as json.dumps does, the id
optional and unknown to v2. From v11 on, for each call: [TOOL_CALLS], the name, perhaps [CALL_ID] and an id (v11 alone),
[ARGS], the arguments. That is how mistral-common's tokenizer of each version writes a call of the history.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maestrale.errors import RequestError, shown
from maestrale.sampling.constraint import Constraint
from maestrale.text.stream import StreamDecoder
from maestrale.text.vocabulary import Vocabulary

TOOL_CONTROLS = {"[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"}
_MAX_RULES = 400_000
_ID = "/[a-zA-Z0-9]{9}/"
# From the end of one call's arguments, or the beginning of the list, to the beginning of the next one's.
_HEAD = re.compile(
    r'(?:(?:, "id": "[^"]*")?\}, | ?\[)\{"name": ("(?:[^"\\]|\\.)*"), "arguments": (?=\{)',
)


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made; in a stream, the next piece of one: then only its first piece has id and name.

    index: which call of the answer. arguments: JSON text.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


def require_tools(vocabulary: Vocabulary, param: str = "tools") -> None:
    """RequestError that names `param` where a tokenizer has no tokens for tools."""
    if not vocabulary.controls.keys() >= TOOL_CONTROLS:
        raise RequestError(
            f"tools: the {vocabulary.kind} tokenizer has no tokens for them; use a model of v0.3 or later", param
        )


def tool_constraint(
    vocabulary: Vocabulary,
    functions: Sequence[Mapping[str, Any]],
    choice: Any = None,
    parallel: Any = None,
    content: Constraint | None = None,
) -> Constraint | None:
    """What an answer may be where `functions` are offered, as `read_tools` gives them.

    choice: "auto" (also None), "none", "required" (also "any"), or {"type": "function", "function": {"name": …}} for
    exactly one call of that one. parallel: false allows one call at most; None is true. content: what the text must
    be, where there is text. RequestError that names tool_choice, parallel_tool_calls or tools.
    """
    if not isinstance(parallel, bool | None):
        raise RequestError(f"parallel_tool_calls = {shown(parallel)}: expected true or false", "parallel_tool_calls")
    named = _named(choice)
    if named is None and choice not in (None, "auto", "none", "required", "any"):
        raise RequestError(
            f'tool_choice = {shown(choice)}: expected auto, none, required or {{"type": "function", "function": '
            '{"name": …}}',
            "tool_choice",
        )
    if named is not None:
        functions = [function for function in functions if function["name"] == named]
    if not functions and (named or choice in ("required", "any")):
        raise RequestError(f"tool_choice = {shown(named or choice)}: no such function among the tools", "tool_choice")
    if not functions:
        return content
    require_tools(vocabulary)
    if choice == "none":
        return content or Constraint(None, param="tools")
    rules = call_rules(vocabulary, functions, parallel=named is None and parallel is not False)
    if len(rules) > _MAX_RULES:
        raise RequestError(f"tools: {len(rules)} characters of schemas: expected at most {_MAX_RULES}", "tools")
    if named or choice in ("required", "any"):
        return Constraint(None, calls=rules, must_call=True, param="tools")
    text = content or Constraint(None)
    return Constraint(text.kind, text.text, rules, param="tools", text_param=text.param)


def _named(choice: Any) -> str | None:
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def call_rules(vocabulary: Vocabulary, functions: Sequence[Mapping[str, Any]], parallel: bool) -> str:
    """Lark rules of which `calls` is one call of one of `functions`, or, if `parallel`, one or more.

    functions: as `read_tools` gives them. The arguments are held to their schema. What llguidance does not know in a
    schema is left out, except for a function that says "strict": there it is refused.
    """
    listed = not _marks_arguments(vocabulary)
    rules = [f"call_{i}: {_call(vocabulary, function, listed)}" for i, function in enumerate(functions)]
    call = " | ".join(f"call_{i}" for i in range(len(functions)))
    begin = _control(vocabulary, "[TOOL_CALLS]")
    if listed:  # a SentencePiece model writes a space before the list
        more = '(", " call)*' if parallel else ""
        calls = f'{begin} " "? "[" call {more} "]"'
    else:
        calls = "call+" if parallel else "call"
    return "\n".join([f"calls: {calls}", f"call: {call}", *rules])


def _call(vocabulary: Vocabulary, function: Mapping[str, Any], listed: bool) -> str:
    name = json.dumps(function["name"], ensure_ascii=False)
    arguments = f"%json {json.dumps(_arguments(function), ensure_ascii=False)}"
    if listed:
        call_id = "" if vocabulary.chat_version == "v2" else f'(", \\"id\\": \\"" {_ID} "\\"")?'
        head = json.dumps(f'{{"name": {name}, "arguments": ', ensure_ascii=False)
        return f'{head} {arguments} {call_id} "}}"'
    begin, middle = _control(vocabulary, "[TOOL_CALLS]"), _control(vocabulary, "[ARGS]")
    if vocabulary.chat_version == "v11":
        middle = f"({_control(vocabulary, '[CALL_ID]')} {_ID})? {middle}"
    return f"{begin} {name} {middle} {arguments}"


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object; none at all where it has no parameters."""
    schema = dict(function["parameters"] or {"additionalProperties": False})
    kinds = schema.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise RequestError(f"tools: {function['name']}: parameters of type {shown(kinds)}: expected object", "tools")
    spacing = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    return schema | {"type": "object", "x-guidance": spacing | {"lenient": not function.get("strict")}}


def _control(vocabulary: Vocabulary, name: str) -> str:
    return f"<[{vocabulary.controls[name]}]>"


def _marks_arguments(vocabulary: Vocabulary) -> bool:
    return vocabulary.chat_version in ("v11", "v13")


class CallReader:
    """Text and calls out of an answer that comes in pieces.

    decoder: a fresh one that begins as the answer's does. call_id: gives each call its id, from its index. (The
    model's own id comes after the arguments, too late to stream, if it comes at all.)
    """

    def __init__(self, vocabulary: Vocabulary, decoder: StreamDecoder, call_id: Callable[[int], str]):
        self._marks = {vocabulary.controls.get(name): name for name in ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")}
        self._marked = _marks_arguments(vocabulary)
        self._decoder, self._call_id = decoder, call_id
        self.count = 0  # of calls so far
        self._mark = ""  # the last one seen; none while the text goes on
        self._held = ""  # read and not yet given: a name, or what a list says before arguments begin
        self._scan: _ObjectEnd | None = None  # inside arguments of a list

    def push(self, token_ids: Sequence[int], text: str, ended: bool = False) -> tuple[str, list[ToolCall]]:
        """A piece of the answer, as the engine gives it → what it adds to the text, and to the calls.

        text: what the engine shows for these ids. It counts up to the first call; from there on the ids do, because
        only they tell where a call begins. ended: it is the last piece.
        """
        calls: list[ToolCall] = []
        begun, after = bool(self._mark), ""
        for token_id in token_ids:
            added = self._decoder.push(token_id)
            mark = self._marks.get(token_id)
            if mark is not None:
                self._pass(mark, calls)
            elif self._mark:
                after += added
                (self._read_marked if self._marked else self._read_list)(added, calls)
        if not self._mark:
            return text, calls
        if ended:  # a character that was cut off shows as U+FFFD at the end of `text`
            after += self._decoder.finish()
        return "" if begun else text.removesuffix(after), calls

    def _pass(self, mark: str, calls: list[ToolCall]) -> None:
        self._mark = mark
        if mark == "[TOOL_CALLS]":
            self._held = ""
        elif mark == "[ARGS]" and self._marked:
            self._open(self._held, calls)

    def _read_marked(self, added: str, calls: list[ToolCall]) -> None:
        if self._mark == "[TOOL_CALLS]":
            self._held += added
        elif self._mark == "[ARGS]":
            self._go_on(added, calls)

    def _read_list(self, added: str, calls: list[ToolCall]) -> None:
        self._held += added
        while True:
            if self._scan is None:
                head = _HEAD.match(self._held)
                if head is None:
                    return
                self._open(json.loads(head[1]), calls)
                self._held, self._scan = self._held[head.end() :], _ObjectEnd()
            end = self._scan.find(self._held)
            self._go_on(self._held[:end], calls)
            if end is None:
                self._held = ""
                return
            self._held, self._scan = self._held[end:], None

    def _open(self, name: str, calls: list[ToolCall]) -> None:
        calls.append(ToolCall(self.count, self._call_id(self.count), name, ""))
        self.count += 1

    def _go_on(self, arguments: str, calls: list[ToolCall]) -> None:
        if calls and calls[-1].index == self.count - 1:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + arguments)
        elif arguments:
            calls.append(ToolCall(self.count - 1, None, None, arguments))


class _ObjectEnd:
    """Finds where a JSON object that comes in pieces ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, piece: str) -> int | None:
        """Characters of `piece` up to the end, None where it is not in it."""
        for i, sign in enumerate(piece):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = sign == "\\"
                self._in_string = sign != '"'
            elif sign == '"':
                self._in_string = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


def short_id(text: str) -> str:
    """Nine letters and digits, as these models learned call ids; always the same nine for a text."""
    import hashlib  # no token waits for it but a call's

    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:9]
