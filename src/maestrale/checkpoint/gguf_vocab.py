"""A GGUF header's SentencePiece vocabulary ↔ a SentencePiece file, so that text is cut by the library in both forms.

Of the file, a protocol buffer, four messages matter (sentencepiece_model.proto of github.com/google/sentencepiece):
ModelProto {1: pieces, 2: trainer, 3: normalizer}, piece {1: text, 2: score, 3: type}, trainer {3: kind, 40: unk id,
41: bos id, 42: eos id, 35: bytes}, normalizer {2: table of rewritten characters, 3: space put before a text, 4: spaces
that are removed}. The types of pieces have the same numbers in both forms.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maestrale.checkpoint.gguf_room import open_gguf
from maestrale.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
_BPE, _NORMAL, _USER_DEFINED, _BYTE = 2, 1, 4, 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NONE = (1 << 64) - 1  # -1 as the file spells it


@dataclass(frozen=True)
class SentencePieces:
    """tokens: text of each as bytes. A space is put before every text where `space_prefix` is set."""

    tokens: list[bytes]
    scores: list[float]
    types: list[int]
    bos_id: int
    eos_id: int
    unk_id: int
    space_prefix: bool


def from_gguf(path: Path) -> SentencePieces:
    """What a GGUF file's header says; CheckpointError where it is another kind of tokenizer, or damaged."""
    values = open_gguf(path).values

    def get(key: str, default: Any = None) -> Any:
        return values.get(_PREFIX + key, default)

    if (kind := get("model")) != "llama":
        raise CheckpointError(
            f"{path} (header): tokenizer.ggml.model = {str(kind)[:40]!r}; only 'llama' (SentencePiece) is read; put "
            "the model's own tokenizer beside the file, in a folder, and name the folder"
        )
    tokens, scores, types = get("tokens"), get("scores"), get("token_type")
    count = len(tokens) if isinstance(tokens, list) else -1
    if (
        not isinstance(scores, np.ndarray)
        or not isinstance(types, np.ndarray)
        or not len(scores) == len(types) == count
    ):
        raise CheckpointError(f"{path} (header): {_PREFIX}tokens, scores and token_type must be lists of one length")
    bos, eos, unk = (get(f"{name}_token_id", default) for name, default in (("bos", 1), ("eos", 2), ("unknown", 0)))
    if not all(type(i) is int and 0 <= i < count for i in (bos, eos, unk)) or not set(types.tolist()) <= set(
        range(_BYTE + 1)
    ):
        raise CheckpointError(f"{path} (header): a {_PREFIX}… id or type is out of its range")
    types = np.where(types == 0, _NORMAL, types)
    return SentencePieces(
        tokens, scores.tolist(), types.tolist(), bos, eos, unk, space_prefix=bool(get("add_space_prefix", True))
    )


def to_header(pieces: SentencePieces) -> dict[str, Any]:
    """The inverse of `from_gguf`, but for pieces that users defined whose characters no other piece has, such as line
    feeds: llama.cpp puts a space after user-defined pieces, which SentencePiece does not. As ordinary pieces they are
    found just the same, since nothing else can merge with them."""
    used = set().union(
        *(
            token.decode(errors="replace")
            for token, kind in zip(pieces.tokens, pieces.types, strict=True)
            if kind == _NORMAL
        )
    )
    types = [
        _NORMAL if kind == _USER_DEFINED and not used & set(token.decode(errors="replace")) else kind
        for token, kind in zip(pieces.tokens, pieces.types, strict=True)
    ]
    return {
        _PREFIX + "model": "llama",
        _PREFIX + "pre": "default",
        _PREFIX + "tokens": pieces.tokens,
        _PREFIX + "scores": np.array(pieces.scores, "<f4"),
        _PREFIX + "token_type": np.array(types, "<i4"),
        _PREFIX + "bos_token_id": pieces.bos_id,
        _PREFIX + "eos_token_id": pieces.eos_id,
        _PREFIX + "unknown_token_id": pieces.unk_id,
        _PREFIX + "add_bos_token": True,
        _PREFIX + "add_eos_token": False,
        _PREFIX + "add_space_prefix": pieces.space_prefix,
    }


def to_file(pieces: SentencePieces) -> bytes:
    """A SentencePiece file that cuts text as these pieces say: by pairs, without a rewriting of characters."""
    content = b"".join(
        _field(1, _field(1, token) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.types, strict=True)
    )
    has_bytes = _BYTE in pieces.types
    trainer = _number(3, _BPE) + _number(4, len(pieces.tokens)) + _number(35, has_bytes) + _number(40, pieces.unk_id)
    trainer += _number(41, pieces.bos_id) + _number(42, pieces.eos_id) + _number(43, _NONE)
    return (
        content
        + _field(2, trainer)
        + _field(3, _field(1, b"identity") + _number(3, pieces.space_prefix) + _number(4, 0))
    )


def from_file(content: bytes, path: Path) -> SentencePieces:
    """What a SentencePiece file says; CheckpointError where a GGUF header has no words for it."""
    try:
        fields = list(_fields(content))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trainer, normalizer = ({k: v for n, value in fields if n == i for k, v in _fields(value)} for i in (2, 3))
        tokens = [piece[1] for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    except (IndexError, KeyError, TypeError, struct.error):
        raise CheckpointError(f"{path}: damaged, or no SentencePiece model: copy the file again") from None
    if trainer.get(3, 1) != _BPE or normalizer.get(2) or normalizer.get(4, 1):
        raise CheckpointError(
            f"{path}: a GGUF file has words only for SentencePiece models of pairs (BPE) that rewrite no characters "
            "and remove no spaces"
        )
    types = [piece.get(3, _NORMAL) for piece in pieces]
    ids = (trainer.get(41, 1), trainer.get(42, 2), trainer.get(40, 0))
    return SentencePieces(tokens, scores, types, *ids, bool(normalizer.get(3, 1)))


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message; bytes but for varints. IndexError where it is cut off."""
    at = 0
    while at < len(content):
        key, at = _read_varint(content, at)
        if key & 7 == _VARINT:
            value, at = _read_varint(content, at)
            yield key >> 3, value
            continue
        if key & 7 == _BYTES:
            length, at = _read_varint(content, at)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}[key & 7]
        if length > len(content) - at:
            raise IndexError
        yield key >> 3, content[at : at + length]
        at += length


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; at most ten bytes."""
    value = 0
    for i in range(10):
        value |= (content[at + i] & 0x7F) << 7 * i
        if content[at + i] < 0x80:
            return value, at + i + 1
    raise IndexError


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(int(value))


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)
