"""What a chat asks of its answer's form, response_format and tools, as one constraint; and the calls in the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from maestrale.errors import shown
from maestrale.llm import Completion
from maestrale.sampling.constraint import KINDS, Constraint, read_constraint
from maestrale.sampling.params import SamplingParams
from maestrale.serve.problems import bad_request
from maestrale.serve.protocol import ChatRequest
from maestrale.text.tokenizer import Tokenizer
from maestrale.text.tools import CallReader, ToolCall


def prepare(tokenizer: Tokenizer, body: ChatRequest) -> tuple[list[int], SamplingParams]:
    """The prompt of a chat and its sampling, its constraint compiled: may take a second, so not on the event loop.

    RequestError that names the field where something is wrong, not supported or cannot be met.
    """
    params = body.chat_params()
    ids = tokenizer.encode_chat(body.messages, body.tools)
    content = read_format(body.response_format)
    constraint = tokenizer.tool_constraint(body.tools, body.tool_choice, body.parallel_tool_calls, content)
    if constraint is None:
        return ids, params
    if params.ignore_eos:
        raise bad_request(f"ignore_eos: not with {constraint.param}", "ignore_eos")
    tokenizer.grammars.matcher(constraint, tokenizer.stream().drops_space)
    return ids, replace(params, constraint=constraint)


def read_format(response_format: Any) -> Constraint | None:
    """OpenAI's response_format: text, json_object, json_schema; and {"type": "regex", "regex": …}, {"type": "grammar",
    "grammar": …}. A schema that does not say strict may hold keywords that are not known: they are left out."""
    name = "response_format"
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in ("text", *KINDS):
        got = shown(response_format)
        raise bad_request(f"{name} = {got}: expected an object of type text, {', '.join(KINDS)}", name)
    if kind == "text":
        return None
    if kind == "json_object":
        return read_constraint({"json_object": True}, name)
    words = response_format.get(kind)
    if kind == "json_schema":
        if not isinstance(words, Mapping) or not isinstance(words.get("schema"), (Mapping, bool)):
            raise bad_request(f'{name}.json_schema: expected {{"name": …, "schema": {{…}}}}', name)
        strict, words = words.get("strict"), words["schema"]
        if not isinstance(strict, bool | None):
            raise bad_request(f"{name}.json_schema.strict = {shown(strict)}: expected true or false", name)
        if isinstance(words, Mapping):
            words = {**words, "x-guidance": {"lenient": not strict}}
    return read_constraint({kind: words}, name)


class Answers:
    """Takes the calls out of a request's answers, whole ones or pieces.

    request_id: gives the calls their ids. reads_calls: whether there may be any; else all is text.
    """

    def __init__(self, tokenizer: Tokenizer, request_id: str, reads_calls: bool):
        self._tokenizer, self._request_id, self._reads_calls = tokenizer, request_id, reads_calls
        self._readers: dict[int, CallReader] = {}

    def split(self, completion: Completion) -> tuple[str, list[ToolCall], str | None]:
        """The text, the calls and the finish_reason of an answer, or of its next piece."""
        index, reason = completion.index, completion.finish_reason
        if not self._reads_calls:
            return completion.text, [], reason
        if index not in self._readers:
            self._readers[index] = self._tokenizer.read_calls(f"{self._request_id} {index}")
        reader = self._readers[index]
        text, calls = reader.push(completion.token_ids, completion.text, ended=reason is not None)
        return text, calls, "tool_calls" if reader.count and reason == "stop" else reason


def call_delta(call: ToolCall) -> dict[str, Any]:
    """A piece of a call as a stream's delta has it. Later pieces have an empty name: Mistral's client demands one, and
    others add it to the first."""
    if call.name is None:
        return {"index": call.index, "function": {"name": "", "arguments": call.arguments}}
    return {"index": call.index} | call_json(call)


def call_json(call: ToolCall) -> dict[str, Any]:
    """A call as an answer has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
