"""A tekken.json: byte-pair merges over raw bytes, after a block of control tokens.

Read here, not by mistral-common: its class needs three times as long, and its checks are asserts, which a damaged
file passes under `python -O`. The merging is tiktoken's in both, so ids are equal (tests hold us to it).
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from maestrale.errors import CheckpointError, RequestError, first_line
from maestrale.text.vocabulary import Pieces, Vocabulary

# The control tokens of the first tekken files, which do not list them.
_UNLISTED_CONTROLS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
# The regular expression that cuts text into words overflows its stack on a run of white space near a million.
_LONGEST_BLANK = 100_000
_BLANK = re.compile(rf"\s{{{_LONGEST_BLANK + 1}}}")


def read_tekken(path: Path, content: bytes) -> Vocabulary:
    """The vocabulary in `content`, read from `path`. CheckpointError where it is damaged."""
    import tiktoken

    try:
        data = json.loads(content)
        config = data["config"]
        pattern, version = config["pattern"], config["version"]
        n_controls = _count(config["default_num_special_tokens"])
        n_words = _count(config["default_vocab_size"]) - n_controls
        controls = _controls(data.get("special_tokens"), n_controls)
        words = _words(data["vocab"], n_words)
        if not re.fullmatch(r"v\d+", version):
            raise ValueError(f"version {version!r}")
        encoding = tiktoken.Encoding(
            path.name,
            pat_str=pattern,
            mergeable_ranks={word: rank for rank, word in enumerate(words)},
            special_tokens={},
        )
        bos_id, eos_id = controls["<s>"], controls["</s>"]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"{path}: damaged, or no tekken file: {reason}") from None

    def encode_text(text: str) -> list[int]:
        if _BLANK.search(text):
            raise RequestError(f"prompt: more than {_LONGEST_BLANK} blanks in a row", param="prompt")
        return [n_controls + rank for rank in encoding.encode_ordinary(text)]

    return Vocabulary(
        kind="tekken",
        chat_version=version,
        bos_id=bos_id,
        eos_id=eos_id,
        controls=controls,
        pieces=Pieces(
            shown=[*[None] * n_controls, *words],
            opening={},
            errors="replace",
            control_breaks=True,
        ),
        encode_text=encode_text,
        path=path,
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
        raise ValueError(f"expected a count, got {value!r}")
    return value


def _controls(listed: Any, n_controls: int) -> dict[str, int]:
    names = _UNLISTED_CONTROLS if listed is None else [token["token_str"] for token in listed]
    if listed is not None and [token["rank"] for token in listed] != list(range(len(listed))):
        raise ValueError("special_tokens are not ranked 0, 1, 2, …")
    if len(names) > n_controls or len(set(names)) != len(names):
        raise ValueError(f"{len(names)} special_tokens, some of them double or beyond the {n_controls} announced")
    return {name: rank for rank, name in enumerate(names)}


def _words(entries: Any, n_words: int) -> list[bytes]:
    """The first `n_words` words: a file may hold more than its model uses."""
    if not 256 <= n_words <= len(entries):
        raise ValueError(f"{n_words} words announced, {len(entries)} there, at least 256 needed")
    words = []
    for rank, entry in enumerate(entries[:n_words]):
        if entry["rank"] != rank:
            raise ValueError(f"vocab[{rank}] has rank {entry['rank']!r}")
        words.append(base64.b64decode(entry["token_bytes"], validate=True))
    if words[:256] != [bytes([i]) for i in range(256)] or len(set(words)) != n_words or b"" in words:
        raise ValueError("vocab must begin with the 256 single bytes and name each word once")
    return words
