"""Reading small files that nobody vouches for: bounded size and depth, no duplicate keys, no NaN."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from maestrale.errors import CheckpointError

MAX_BYTES = 100_000_000
MAX_DEPTH = 64
# Possessive, and the closing quote optional, so that hostile quotes cost no backtracking.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[{}\[\]]', re.DOTALL)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that the file holds; CheckpointError names the file and what is wrong."""
    return parse_json(read_bounded(path), str(path))


def read_bounded(path: str | Path) -> bytes:
    """A small file as a whole; CheckpointError where it is a pipe, which could keep us waiting, or too large."""
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES:,} bytes, which no such file is")
    return data


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """The object in `data`, UTF-8; `source` names the place in errors."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: not UTF-8 at byte {error.start}") from None
    if _too_deep(data):
        raise CheckpointError(f"{source}: JSON nested more than {MAX_DEPTH} deep")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{source}: duplicate key {twice!r}")
        return found

    def no_constant(word: str) -> NoReturn:
        raise CheckpointError(f"{source}: {word} is not JSON; expected a finite number")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{source}: not JSON: {error}") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise CheckpointError(f"{source}: not JSON: a number with too many digits") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def _too_deep(data: bytes) -> bool:
    """Whether brackets outside strings open more than MAX_DEPTH deep; found before a recursive parser sees them."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif token in (b"}", b"]"):
            depth -= 1
    return False
