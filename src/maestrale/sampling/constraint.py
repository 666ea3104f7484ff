"""What a completion must be: the words for it, checked without the library that will hold the model to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maestrale.errors import RequestError, first_line, shown

MAX_LENGTH = 100_000  # characters of a schema, regex or grammar: compiling takes up to a second for so many
KINDS = ("json_object", "json_schema", "regex", "grammar")


@dataclass(frozen=True)
class Constraint:
    """What a completion may be. Hashable, and the same for the same words, so that a compiled one can be kept.

    kind: what its text must be: "json_schema" (`text` is the schema, as JSON), "regex" (the whole text matches it),
        "grammar" (a Lark grammar in the dialect of llguidance, its rule `start`), or None: any text.
    calls: Lark rules, one of them named `calls`, of tool calls that may follow any text, or come in place of a text
        of some kind. Empty: none may come. must_call: they must come, and there is no text.
    param: the field of the request that an error names; text_param: where calls stand beside a text of some kind, the
        field that an error in that names.
    """

    kind: str | None
    text: str = ""
    calls: str = ""
    must_call: bool = False
    param: str = "constraint"
    text_param: str = "constraint"


def read_constraint(value: Any, param: str = "constraint") -> Constraint | None:
    """A mapping of one of `KINDS` to its words: {"json_object": True}, {"json_schema": schema as a dict or as JSON},
    {"regex": text}, {"grammar": text}. RequestError that names `param` for anything else. What is wrong inside a
    schema, regex or grammar shows when it is compiled."""
    if value is None or isinstance(value, Constraint):
        return value
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise RequestError(f"{param} = {shown(value)}: expected one of {', '.join(KINDS)} with its value", param)
    ((kind, words),) = value.items()
    if kind == "json_object":
        if words is not True:
            raise RequestError(f"{param}: json_object = {shown(words)}: expected true", param)
        return Constraint("json_schema", '{"type": "object"}', param=param)
    text = _schema(words, param) if kind == "json_schema" else words
    if not isinstance(text, str):
        raise RequestError(f"{param}: {kind} = {shown(text)}: expected text", param)
    if len(text) > MAX_LENGTH:
        raise RequestError(f"{param}: {kind} of {len(text)} characters: expected at most {MAX_LENGTH}", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"{param}: {kind} holds half of a surrogate pair: expected well-formed Unicode", param
        ) from None
    return Constraint(kind, text, param=param)


def _schema(words: Any, param: str) -> str:
    """A JSON schema as JSON, in one form."""
    if isinstance(words, str):
        try:
            words = json.loads(words)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param}: json_schema: expected JSON: {first_line(error)}", param) from None
    if not isinstance(words, (Mapping, bool)):
        raise RequestError(f"{param}: json_schema = {shown(words)}: expected an object", param)
    try:
        return json.dumps(words, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param}: json_schema: expected JSON: {first_line(error)}", param) from None
