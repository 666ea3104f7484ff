"""Holding a completion to a constraint: which tokens may come next, worked out by llguidance on a tokenizer's bytes.

The text is what counts: any tokens that spell a text which the constraint allows are allowed, but where it leaves no
choice of text only those of the tokenizer's own spelling. A control token is allowed only where the constraint names
it, and the end of sequence only where the text is complete. llguidance is imported at the first constraint; a
tokenizer's trie is built then, once (0.3 s at 32,768 tokens, 2 s at 131,072).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maestrale.errors import RequestError, UsageError
from maestrale.sampling.constraint import Constraint
from maestrale.sampling.mask import Mask
from maestrale.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT = 64  # compiled constraints of a tokenizer
_MASKS = 32  # sets of tokens that are kept ready: few differ
_LEXER_FUEL = 300_000  # the library's own unit of work: (a{1000}){1000} is given up after half a second
# Between the parts of JSON: a space, or a new line and its indentation; never an endless run of blanks.
_JSON_SPACE = r"\x20|\n[\x20\t]{0,16}"
_ANY_TEXT = r"/(.|\n)*/"


class Matcher:
    """One completion's way through a constraint: the tokens that may come next (an `Allowed` of policy.py), and
    `consume`, which goes on by one. The end of sequence is among them where the text is complete.

    Whether a token may come is asked for it alone, which takes some microseconds: greedy texts seldom need more. All
    tokens are worked out where they are wanted, which takes up to a hundred times as long.

    finished: the text is complete and nothing can be added to it. calls_begun: a tool call has begun.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        constraint: Constraint,
        vocabulary: Vocabulary,
        masks: Callable[[bytes], Mask],
        first: NDArray[np.uint8] | None = None,
    ):
        """masks: a set of tokens from its bits, the same object again where it can. first: the tokens that may come
        first, a bit for each; None where all may that the constraint allows.

        RequestError where none may."""
        self._matcher, self._constraint, self._masks = matcher, constraint, masks
        self._eos_id, self._bytes = vocabulary.eos_id, -(-vocabulary.size // 8)
        self._calls_id = vocabulary.controls.get("[TOOL_CALLS]") if constraint.calls else None
        self.calls_begun = self.finished = False
        self._mask: Mask | None = None
        self._last: Mask | None = None  # that was worked out
        self._only: int | None = None
        mask = self.mask()
        if first is not None:
            self._mask = masks((np.frombuffer(mask.bits, np.uint8) & first).tobytes())
        if not self._mask:
            raise _wrong(constraint, "")
        if matcher.is_stopped():
            self._stop()

    def only(self) -> int | None:
        return self._only

    def __contains__(self, token: int) -> bool:
        if self._mask is not None:
            return token in self._mask
        if token == self._eos_id:
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token]) == 1 if self._only is None else token == self._only

    @property
    def ready(self) -> bool:
        return self._mask is not None

    def mask(self) -> Mask:
        """RequestError where the constraint gets too complex, or leads nowhere."""
        if self._mask is None:
            self._mask = self._all()
        if self._matcher.is_error() or not self._mask:
            raise _wrong(self._constraint, self._matcher.get_error())
        return self._mask

    def consume(self, token: int, ahead: bool = False) -> None:
        """Go on by a token that was allowed. RequestError where the constraint gets too complex.

        ahead: work out all tokens that may come next, as they will be wanted. What the library looks at lies in the
        processor's cache now, and no more after the model's next step."""
        matcher = self._matcher
        matcher.consume_token(token)
        self._mask = self._only = None
        if token == self._calls_id:
            self.calls_begun = True
        if matcher.is_stopped():  # as it is in any error too
            self._stop()
            return
        spelling = matcher.compute_ff_tokens() if matcher.compute_ff_bytes() else None
        if spelling:  # there is no choice about the text
            self._only = spelling[0]
        elif ahead:
            self._mask = self._all()

    def copy(self) -> Matcher:
        twin = object.__new__(Matcher)
        twin.__dict__.update(self.__dict__)
        twin._matcher = self._matcher.deep_copy()
        return twin

    def _all(self) -> Mask:
        bits = self._matcher.compute_bitmask()[: self._bytes]
        if self._last is None or bits != self._last.bits:  # within a string the same ones often may follow
            self._last = self._masks(bits)
        return self._last

    def _stop(self) -> None:
        if self._matcher.is_error() or not self._matcher.is_accepting():
            raise _wrong(self._constraint, self._matcher.get_error())
        self.finished = True


class Grammars:
    """The matchers of one tokenizer. May be asked from several threads."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._trie: Any = None
        self._kept: OrderedDict[tuple[Constraint, bool], Matcher] = OrderedDict()
        self._masks = lru_cache(_MASKS)(lambda bits: Mask(bits, vocabulary.size))

    def matcher(self, constraint: Constraint, drops_space: bool) -> Matcher:
        """A matcher at its beginning. The first for a constraint compiles it (up to a second), later ones are copies.

        drops_space: the text begins where the tokenizer shows no first space (`StreamDecoder.drops_space`): then the
        tokens must begin with that space, and the text that is shown is what the constraint is about.
        RequestError where it is wrong, not supported or can never be met; UsageError where llguidance is missing.
        """
        key = constraint, drops_space
        with self._lock:
            if self._trie is None:
                self._trie = _trie(self._vocabulary)
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key].copy()
        made = self._compile(constraint, drops_space)
        with self._lock:
            self._kept[key] = made
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made.copy()

    def _compile(self, constraint: Constraint, drops_space: bool) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits

        holds_text = constraint.kind is not None and not constraint.must_call
        if holds_text and (drops_space or constraint.calls):  # the text's own faults are told first, and as its own
            param = constraint.text_param if constraint.calls else constraint.param
            self._compile(Constraint(constraint.kind, constraint.text, param=param), False)
        grammar = json.dumps({"grammars": _grammars(constraint, drops_space)})
        limits = LLParserLimits(initial_lexer_fuel=_LEXER_FUEL, verbose_errors=False)
        matcher = LLMatcher(self._trie, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _wrong(constraint, matcher.get_error())
        first = _first(self._vocabulary) if drops_space and holds_text else None
        return Matcher(matcher, constraint, self._vocabulary, self._masks, first)


def _grammars(constraint: Constraint, drops_space: bool) -> list[dict[str, Any]]:
    """The constraint in llguidance's form: a top grammar, and the one of the text, which it calls @content."""
    content = ('" " @content' if drops_space else "@content") if constraint.kind else _ANY_TEXT
    if not constraint.calls:
        start = content
    elif constraint.must_call:
        start = "calls"
    else:
        start = f"({content}) | calls" if constraint.kind else f"{content} calls?"
    top = {"lark_grammar": f"start: {start}\n{constraint.calls}"}
    if constraint.kind is None or constraint.must_call:
        return [top]
    return [top, {"name": "content"} | _content(constraint)]


def _content(constraint: Constraint) -> dict[str, Any]:
    if constraint.kind == "regex":
        from llguidance import regex_to_lark

        # \d and \w as JavaScript and JSON Schema mean them: ASCII.
        return {"lark_grammar": f"start: /{regex_to_lark(constraint.text, use_ascii='dw')}/"}
    if constraint.kind == "grammar":
        return {"lark_grammar": constraint.text}
    schema = json.loads(constraint.text)
    if isinstance(schema, dict):
        asked = schema.get("x-guidance")
        lenient = isinstance(asked, dict) and asked.get("lenient") is True
        schema["x-guidance"] = {"whitespace_pattern": _JSON_SPACE, "lenient": lenient}
    return {"json_schema": schema}


def _first(vocabulary: Vocabulary) -> NDArray[np.uint8]:
    """Where the first space is not shown: the tokens that lose just that space, and control tokens, as bits.

    The others that begin with one show it (the byte 0x20), or lose more than one.
    """
    pieces = vocabulary.pieces
    loses_one = [
        shown is None or (shown[:1] == b" " and pieces.opening.get(i) == shown[1:])
        for i, shown in enumerate(pieces.shown)
    ]
    return np.packbits(np.array(loses_one), bitorder="little")


def _wrong(constraint: Constraint, reason: str) -> RequestError:
    line = " ".join(reason.replace("<non-verbose/>", "").split())[:300]
    if not line or "NoExtension" in line:
        line = "no text can satisfy it"
    return RequestError(f"{constraint.param}: {line}", constraint.param)


def _trie(vocabulary: Vocabulary) -> Any:
    """The vocabulary as llguidance wants it."""
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise UsageError("constrained output needs llguidance: run  pip install 'maestrale[serve]'") from None
    return LLTokenizer(_Bytes(vocabulary), n_vocab=vocabulary.size)  # type: ignore[arg-type]  # it asks for no more than _Bytes has


class _Bytes:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary):
        self.bos_token_id, self.eos_token_id = vocabulary.bos_id, vocabulary.eos_id
        names = {i: name for name, i in vocabulary.controls.items()}
        taken: set[str] = set()
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for i, shown in enumerate(vocabulary.pieces.shown):
            if shown is None:  # the library knows a control token by its angle brackets
                name = f"<{names.get(i, str(i)).strip('[]<>')}>"
                name = f"<{i}>" if name in taken else name
                taken.add(name)
                shown = name.encode()
                self.special_token_ids.append(i)
            self.tokens.append(shown)
        self._encode = vocabulary.encode_text
        # A tokenizer that puts a space before a text puts it before this line's end, where it can be cut off.
        self._before = "\n" if vocabulary.pieces.opening else ""
        self._cut = len(self._encode(self._before))

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._encode(self._before + text)[self._cut :]
