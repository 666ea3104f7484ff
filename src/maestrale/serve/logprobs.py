"""Logprobs in the two forms that clients read: the chat's list of tokens, the completions' four columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maestrale.llm import Completion
from maestrale.text.tokenizer import Tokenizer

Top = Sequence[tuple[int, float]]

_LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


def chat_logprobs(tokenizer: Tokenizer, completion: Completion) -> dict[str, Any] | None:
    """One entry for each token, with its alternatives."""
    if completion.logprobs is None:
        return None
    tops = completion.top_logprobs or []
    return {
        "content": [
            _entry(tokenizer, token, logprob) | {"top_logprobs": [_entry(tokenizer, *pair) for pair in top]}
            for token, logprob, top in zip(completion.token_ids, completion.logprobs, tops, strict=True)
        ],
        "refusal": None,
    }


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    shown = tokenizer.piece(token)
    return {
        "token": shown.decode(errors="replace"),
        "logprob": max(logprob, _LOWEST),
        "bytes": list(shown),
    }


class Columns:
    """The completions' form, made piece by piece: tokens, token_logprobs, top_logprobs, text_offset.

    after: the prompt's ids where the answer's text does not hold them; offsets count from the answer's beginning.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]):
        self._tokenizer, self._decoder, self._offset = tokenizer, tokenizer.stream(after), 0

    def rows(self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Top | None]) -> dict[str, Any]:
        """The columns of some tokens more. top_logprobs holds the token itself too, as lm-eval expects; a text's first
        token has no logprob: null."""
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(token))
        return {
            "tokens": [_name(self._tokenizer.piece(token)) for token in ids],
            "token_logprobs": [None if logprob is None else max(logprob, _LOWEST) for logprob in logprobs],
            "top_logprobs": [self._alternatives(*column) for column in zip(ids, logprobs, tops, strict=True)],
            "text_offset": offsets,
        }

    def _alternatives(self, token: int, logprob: float | None, top: Top | None) -> dict[str, float] | None:
        if logprob is None or top is None:
            return None
        row: dict[str, float] = {}
        for i, value in [(token, logprob), *top]:
            row.setdefault(_name(self._tokenizer.piece(i)), max(value, _LOWEST))
        return row


def _name(shown: bytes) -> str:
    """A token's text; of one that is no whole character, its bytes, so that two of them keep two names."""
    try:
        return shown.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in shown)
