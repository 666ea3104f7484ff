"""An OpenAI-style chat, checked and put into turns: what any client may send, nothing a template would trip over."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maestrale.errors import RequestError, shown
from maestrale.text.tools import short_id
from maestrale.text.vocabulary import require_text

ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_WEIGHT = 100
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True)
class Call:
    """One function that the assistant called; arguments is a JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """One message. role: system, user, assistant or tool.

    calls: an assistant's. answers: the call that a tool's text is the result of.
    prefix: the assistant's text is only begun, the model goes on with it.
    weight: how much an assistant's words count in training; nothing else reads it.
    """

    role: str
    text: str
    calls: tuple[Call, ...] = ()
    answers: Call | None = None
    prefix: bool = False
    weight: float = 1.0


def read_messages(messages: Sequence[Mapping[str, Any]], finished: bool = False) -> list[Turn]:
    """The turns of a chat, in order; an assistant's empty messages, which say nothing, are left out.

    RequestError (param "messages") for what is no chat, a result without its call, a content that is no text, and a
    chat that leaves the assistant nothing to say; or, of one that is `finished`, in which it has not said the last
    word.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise _wrong("messages", "expected a list of at least one message")
    calls: dict[str, Call] = {}
    turns = [_turn(f"messages[{i}]", message, calls) for i, message in enumerate(messages)]
    last = next((turn for turn in reversed(turns) if turn.role != "system"), None)
    for i, turn in enumerate(turns[:-1]):
        if turn.prefix:
            raise _wrong(f"messages[{i}]", "prefix: only the last message can be one to go on with")
    if finished:
        if last is None or last.role != "assistant" or last.prefix or not (last.text or last.calls):
            raise _wrong("messages", "the last one must be a finished answer of the assistant")
        turns = [_weighed(f"messages[{i}]", *both) for i, both in enumerate(zip(turns, messages, strict=True))]
    elif last is not None and last.role == "assistant" and not last.prefix:
        raise _wrong("messages", "the last one is the assistant's: add a user message, or set its prefix to true")
    return [turn for turn in turns if turn.role != "assistant" or turn.text or turn.calls]


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """name, description, parameters, strict of each function offered. RequestError (param "tools") for others."""
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError("tools: expected a list", param="tools")
    return [_function(f"tools[{i}]", tool) for i, tool in enumerate(tools)]


def _function(where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(f'{where}: expected {{"type": "function", "function": {{…}}}}', param="tools")
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.function.name: expected a name, got {shown(name)}", param="tools")
    if not isinstance(parameters, Mapping | None):
        raise RequestError(
            f"{where}.function.parameters: expected a JSON schema, got {shown(parameters)}", param="tools"
        )
    if not isinstance(strict, bool | None):
        raise RequestError(f"{where}.function.strict = {shown(strict)}: expected true or false", param="tools")
    read = {"name": name, "description": "" if description is None else description, "parameters": parameters or {}}
    try:
        require_text(json.dumps(read, ensure_ascii=False, allow_nan=False), "tools")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where}.function: no JSON: {error}", param="tools") from None
    if not isinstance(read["description"], str):
        raise RequestError(f"{where}.function.description: expected text", param="tools")
    return read | {"strict": bool(strict)}


def _turn(where: str, message: Any, calls: dict[str, Call]) -> Turn:
    """One message; the assistant's calls are added to `calls`, the tools' answers looked up there."""
    if not isinstance(message, Mapping):
        raise _wrong(where, f"expected an object, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise _wrong(where, f"role = {shown(role)}: expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role in ("assistant", "tool"):
        content = ""
    text = _text(f"{where}.content", content)
    if role == "assistant":
        prefix = message.get("prefix", False)
        if not isinstance(prefix, bool | None):
            raise _wrong(where, f"prefix = {shown(prefix)}: expected true or false")
        made = _calls(f"{where}.tool_calls", message.get("tool_calls"))
        calls.update({call.id: call for call in made})
        if made and prefix:
            raise _wrong(where, "prefix: a message with tool_calls cannot be gone on with")
        return Turn(role, text, calls=tuple(made), prefix=bool(prefix))
    if role == "tool":
        call_id = message.get("tool_call_id")
        call = calls.get(_short_id(call_id)) if isinstance(call_id, str) else None
        if call is None:
            raise _wrong(where, f"tool_call_id = {shown(call_id)} answers no call of an assistant message before it")
        return Turn(role, text, answers=call)
    return Turn("system" if role == "developer" else role, text)


def _weighed(where: str, turn: Turn, message: Mapping[str, Any]) -> Turn:
    """A turn with its message's `weight`, which an assistant's alone may have."""
    weight = message.get("weight")
    if weight is None:
        return turn
    if type(weight) not in (int, float) or not 0 <= weight <= _MOST_WEIGHT:
        raise _wrong(where, f"weight = {shown(weight)}: expected a number from 0 to {_MOST_WEIGHT}")
    if turn.role != "assistant":
        raise _wrong(where, "weight: only an assistant's message is learnt and can have one")
    return replace(turn, weight=float(weight))


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return _checked(where, content)
    if not isinstance(content, Sequence):
        raise _wrong(where, f"expected text or a list of text parts, got {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _wrong(where, f"a part of type {shown(kind)}: this model reads text only")
        texts.append(_checked(where, part["text"]))
    return "\n\n".join(text for text in texts if text)


def _calls(where: str, tool_calls: Any) -> list[Call]:
    if tool_calls is None:
        return []
    if not isinstance(tool_calls, Sequence):
        raise _wrong(where, f"expected a list, got {type(tool_calls).__name__}")
    calls = []
    for i, call in enumerate(tool_calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise _wrong(f"{where}[{i}]", 'expected {"id": …, "type": "function", "function": {…}}')
        call_id, name, arguments = call.get("id"), function.get("name"), function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(call_id, str) or not isinstance(name, str) or not call_id or not name:
            raise _wrong(
                f"{where}[{i}]", f"id = {shown(call_id)}, function.name = {shown(name)}: expected two texts, not empty"
            )
        if not isinstance(arguments, str | None):
            raise _wrong(f"{where}[{i}]", f"function.arguments: expected a JSON text, got {type(arguments).__name__}")
        calls.append(Call(_short_id(call_id), _checked(where, name), _checked(where, arguments or "{}")))
    return calls


def _short_id(call_id: str) -> str:
    """Nine letters and digits, as these models learned call ids: the id itself, or always the same nine for it."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return short_id(call_id)


def _checked(where: str, text: str) -> str:
    try:
        return require_text(text, where)
    except RequestError as error:
        raise RequestError(str(error), param="messages") from None


def _wrong(where: str, what: str) -> RequestError:
    return RequestError(f"{where}: {what}", param="messages")
