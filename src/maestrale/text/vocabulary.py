"""What a tokenizer file says, whatever its format: the one form that the rooms fill and the rest reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maestrale.errors import CheckpointError, RequestError

# The control tokens of a chat in the files of v2 and v3; of v7; of v11 and v13.
V2_CONTROLS = frozenset({"[INST]", "[/INST]"})
V7_CONTROLS = V2_CONTROLS | {"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"}
V11_CONTROLS = V7_CONTROLS | {"[ARGS]", "[CALL_ID]"}


@dataclass(frozen=True)
class Pieces:
    """What each token shows, as bytes: enough to decode any sequence of ids from left to right.

    shown: bytes of each id; None for a control token, which shows nothing.
    opening: bytes shown instead of `shown` where a text begins: a first word's space falls away.
    opening_repeats: an opening that shows nothing leaves the text at its beginning.
    errors: how bytes that are no UTF-8 become U+FFFD: "replace" gives one for each maximal wrong part,
        "surrogateescape" (which the decoder translates) one for each byte.
    control_breaks: a control token ends an unfinished character; otherwise it is as if it were not there.
    """

    shown: Sequence[bytes | None]
    opening: Mapping[int, bytes]
    errors: str
    control_breaks: bool
    opening_repeats: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer file, read.

    kind: the name that people know it by: "v1", "v2", "v3", "v7", "tekken" or "hf".
    chat_version: the mistral-common template of its chats ("v1" … "v13"); None where it has no chat form.
    controls: name → id of the control tokens.
    encode_text: text without lone surrogates → ids, no control token among them.
    """

    kind: str
    chat_version: str | None
    bos_id: int
    eos_id: int
    controls: Mapping[str, int]
    pieces: Pieces
    encode_text: Callable[[str], list[int]]
    path: Path

    @property
    def size(self) -> int:
        return len(self.pieces.shown)


def require_text(text: object, param: str) -> str:
    """`text` itself; RequestError that names `param` if it is no string or holds a lone surrogate (no UTF-8)."""
    if not isinstance(text, str):
        raise RequestError(f"{param}: expected text, got {type(text).__name__}", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"is U+{code:04X}, half of a surrogate pair"
        if 0xDC80 <= code <= 0xDCFF:  # so Python hands on what came from a command line
            what += f" or the byte 0x{code - 0xDC00:02x}, which is no UTF-8"
        raise RequestError(f"{param}: character {error.start} {what}: send well-formed Unicode", param=param) from None
    return text


def require_size(path: Path, tokens: int, vocab_size: int) -> None:
    """CheckpointError with both numbers and the usual cause if a tokenizer is not of the model's size."""
    if tokens == vocab_size:
        return
    kinds = {32000: "v1", 32768: "v3", 131072: "tekken"}
    models = {32000: "v0.1, v0.2 or Mixtral 8x7B", 32768: "v0.3", 131072: "Nemo or Ministral"}
    cause = "a v1 tokenizer (32000) beside a v0.3 model (32768)"
    if tokens in kinds and vocab_size in models:
        cause = f"a {kinds[tokens]} tokenizer ({tokens}) beside a {models[vocab_size]} model ({vocab_size})"
    raise CheckpointError(
        f"{path}: {tokens} tokens, but the model's vocab_size is {vocab_size}: the tokenizer of another model, such as "
        f"{cause}; copy the one that came with the weights"
    )
