"""A Hugging Face tokenizer.json.

Encoding is the `tokenizers` library's. Its decoders read a whole text at once, so the ones that these models use are
turned into a table of pieces; another one is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from maestrale.errors import CheckpointError, first_line
from maestrale.text.vocabulary import V2_CONTROLS, V7_CONTROLS, V11_CONTROLS, Pieces, Vocabulary, require_size

_CONTROLS = {"v11": V11_CONTROLS, "v7": V7_CONTROLS, "v3": V2_CONTROLS}  # the newest first
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def read_hf(path: Path, content: bytes, vocab_size: int) -> Vocabulary:
    """The vocabulary in `content`, read from `path` and filled up to `vocab_size` with ids that show nothing.

    CheckpointError where it is damaged, decodes in a way not known here, or has no begin and end of text, and where
    the library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CheckpointError(
            f"{path}: a tokenizer.json is read by the tokenizers library: run  pip install 'maestrale[hf]', or put the "
            "model's tokenizer.model or tekken.json beside it"
        ) from None

    spec = _json(path, content)
    try:
        model = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(f"{path}: damaged, or no tokenizer.json: {first_line(error)}") from None
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # "[INST]" in a text is text
    added = model.get_added_tokens_decoder()
    controls = {token.content: i for i, token in added.items() if token.special}
    size = max([*model.get_vocab(with_added_tokens=True).values(), *added], default=-1) + 1
    if size > vocab_size:
        require_size(path, size, vocab_size)
    tokens = [model.id_to_token(i) for i in range(size)]
    hidden = set(controls.values())
    tokens += [None] * (vocab_size - size)
    pieces = _pieces(path, spec.get("decoder"), [None if i in hidden else token for i, token in enumerate(tokens)])
    names = _begin_and_end(path.with_name("tokenizer_config.json"))
    bos_id, eos_id = (model.token_to_id(name) for name in names)
    if bos_id is None or eos_id is None:
        raise CheckpointError(
            f"{path}: no token {names[0] if bos_id is None else names[1]}; expected the names of the begin and end "
            "of text as bos_token and eos_token in tokenizer_config.json, or <s> and </s>"
        )
    return Vocabulary(
        kind="hf",
        chat_version=_chat_version(controls.keys()),
        bos_id=bos_id,
        eos_id=eos_id,
        controls=controls,
        pieces=pieces,
        encode_text=lambda text: model.encode(text, add_special_tokens=False).ids,
        path=path,
    )


def _chat_version(controls: Set[str]) -> str | None:
    """The newest form whose control tokens are there; v13 has those of v11, and says so nowhere."""
    return next((version for version, needed in _CONTROLS.items() if controls >= needed), None)


def _json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _begin_and_end(path: Path) -> list[str]:
    names = ["<s>", "</s>"]
    if path.is_file():
        try:
            config = _json(path, path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from None
        for i, key in enumerate(("bos_token", "eos_token")):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[i] = value.encode(errors="replace").decode()  # half of a surrogate pair is no token's name
    return names


def _pieces(path: Path, decoder: Any, tokens: list[str | None]) -> Pieces:
    """The library's decoder as a table. A difference by intent: bytes that are no UTF-8 cost one U+FFFD each where
    the library gives up every byte of their run, good ones too; else no character could be shown before its run ends.
    """
    steps = _flatten(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        byte_of = _byte_level()
        return Pieces(
            [None if t is None else _from_byte_level(t, byte_of) for t in tokens],
            opening={},
            errors="replace",
            control_breaks=False,
        )
    if not steps:  # the library joins the tokens by spaces
        words = [None if t is None else t.encode() for t in tokens]
        return Pieces(
            [None if w is None else b" " + w for w in words],
            opening={i: w for i, w in enumerate(words) if w is not None},
            errors="replace",
            control_breaks=False,
        )
    has_bytes, replaced, stripped, metaspace = False, [], None, None
    for i, step in enumerate(steps):
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replaced.append((old, new))
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": str(sign), "start": 0 | 1 as start, "stop": 0} if "Fuse" in kinds[:i]:
                stripped = sign if start else None
            case {"type": "Metaspace", "replacement": str(sign)} if i == len(steps) - 1:
                metaspace = sign if step.get("prepend_scheme", "always") != "never" else None
                replaced.append((sign, " "))
            case _:
                raise CheckpointError(
                    f"{path}: decoder {json.dumps(step)[:80]} is not supported; expected ByteLevel, Metaspace, or "
                    "a sequence of Replace, ByteFallback, Fuse and Strip"
                )
    shown: list[bytes | None] = []
    opening = {}
    for token_id, token in enumerate(tokens):
        if token is None:
            shown.append(None)
            continue
        text = token
        for old, new in replaced:
            text = text.replace(old, new)
        byte = _BYTE.fullmatch(token) if has_bytes else None
        piece = bytes([int(byte[1], 16)]) if byte else text.encode()
        shown.append(piece)
        if stripped is not None and piece.startswith(stripped.encode()):
            opening[token_id] = piece[len(stripped.encode()) :]
        elif metaspace is not None and metaspace in token:  # the first token loses all its signs
            opening[token_id] = token.replace(metaspace, "").encode()
    return Pieces(shown, opening, errors="surrogateescape", control_breaks=False)


def _flatten(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder.get("decoders", []) for step in _flatten(inner)]
    return [decoder]


def _byte_level() -> dict[str, int]:
    """The byte-level alphabet: a printable Latin-1 character is its own byte, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _from_byte_level(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes(byte_of[sign] for sign in token)
    except KeyError:  # an added token stands for its own text
        return token.encode()
