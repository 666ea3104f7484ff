"""A SentencePiece file: v1, v2, v3 and v7.

`sentencepiece` is used directly: mistral-common's class wraps the same call, so ids are equal (tests hold us to it),
but importing it takes half a second where this takes a twentieth.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from maestrale.errors import CheckpointError
from maestrale.text.vocabulary import V7_CONTROLS, Pieces, Vocabulary

_SPACE = "\u2581"  # how a piece spells a space


def read_sentencepiece(path: Path, content: bytes) -> Vocabulary:
    """The vocabulary in `content`, read from `path`. CheckpointError where it is damaged or belies its name."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
        names = model.id_to_piece(list(range(model.get_piece_size())))
        pieces = _pieces(model, names)
    except Exception:  # the library raises what its C++ throws; pieces may be no UTF-8
        raise CheckpointError(
            f"{path}: damaged, or no SentencePiece model ({len(content)} bytes): copy the file again"
        ) from None
    controls = {names[i]: i for i, shown in enumerate(pieces.shown) if shown is None}
    bos_id, eos_id = model.bos_id(), model.eos_id()
    if min(bos_id, eos_id) < 0:
        raise CheckpointError(f"{path}: no begin-of-text or end-of-text token: expected control pieces <s> and </s>")
    version = _version(path, controls.keys())
    return Vocabulary(
        kind=version,
        chat_version=version,
        bos_id=bos_id,
        eos_id=eos_id,
        controls=controls,
        pieces=pieces,
        encode_text=model.encode,
        path=path,
    )


def _version(path: Path, controls: Set[str]) -> str:
    """v1 has no [INST], v7 has [SYSTEM_PROMPT]; v2 and v3 have the same pieces.

    So only a name that ends in .v2 makes v2: the tokenizer.model and tokenizer.model.v3 of 7B v0.3 are, byte for
    byte, the file that mistral-common calls v2.
    """
    held = "v7" if controls >= V7_CONTROLS else "v3" if "[INST]" in controls else "v1"
    named = re.fullmatch(r"\.(v\d+)(m\d+)?", path.suffix)
    claimed = named[1] if named else held
    if claimed == held or (claimed == "v2" and held == "v3"):
        return claimed
    raise CheckpointError(f"{path}: named {claimed}, but its control tokens are those of {held}: rename the file")


def _pieces(model: Any, names: list[str]) -> Pieces:
    ids = list(range(len(names)))
    shown: list[bytes | None] = [name.replace(_SPACE, " ").encode() for name in names]
    unknown = set(_where(model.IsUnknown(ids)))
    for i in unknown:
        shown[i] = model.decode([i]).encode()  # the model may name a sign of its own
    for i in _where(model.IsByte(ids)):
        shown[i] = bytes([int(names[i][3:5], 16)])  # "<0x0A>"
    for i in _where(model.IsControl(ids)):
        shown[i] = None
    spaced = [i for i, name in enumerate(names) if name[:1] == _SPACE and i not in unknown]
    # Whether a text's first space falls away is written in the file's normalizer; asking the model is the plain
    # way to know it. One that also removes extra spaces goes on until something shows.
    word = next((i for i in spaced if len(names[i]) > 1 and names[i][1] != _SPACE), None)
    drops = word is not None and not model.decode([word]).startswith(" ")
    repeats = drops and _SPACE in names and not model.decode([names.index(_SPACE), word]).startswith(" ")
    return Pieces(
        shown=shown,
        opening={i: (shown[i] or b"")[1:] for i in spaced} if drops else {},
        errors="surrogateescape",
        control_breaks=True,
        opening_repeats=repeats,
    )


def _where(flags: list[bool]) -> list[int]:
    return [i for i, flag in enumerate(flags) if flag]
