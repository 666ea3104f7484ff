"""What a request may ask of sampling, checked once, here, for the library, the command line and the server alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from maestrale.errors import RequestError, shown
from maestrale.sampling.constraint import Constraint, read_constraint

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters

# name → (kind, whether None is allowed, lowest, highest), both ends allowed
_RANGES: dict[str, tuple[type, bool, float, float]] = {
    "max_tokens": (int, False, 0, 2**31 - 1),
    "temperature": (float, False, 0, 2),
    "top_k": (int, False, 0, 2**31 - 1),
    "top_p": (float, False, 0, 1),
    "min_p": (float, False, 0, 1),
    "seed": (int, True, -(2**63), 2**63 - 1),
    "n": (int, False, 1, 128),
    "logprobs": (int, True, 0, 20),
    "prompt_logprobs": (int, True, 0, 20),
    "presence_penalty": (float, False, -2, 2),
    "frequency_penalty": (float, False, -2, 2),
    "repetition_penalty": (float, False, 0.01, 10),
    "min_tokens": (int, False, 0, 2**31 - 1),
    "beam_width": (int, False, 1, 4096),
    "length_penalty": (float, False, -10, 10),
}
_ABOVE_ZERO = ("top_p",)
_BIAS_LIMIT = 100


def limits(name: str) -> tuple[float, float]:
    """The lowest and the highest value of a field that is a number."""
    return _RANGES[name][2:]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. A wrong type or value raises RequestError with `param` = the field's name.

    max_tokens: the most tokens to generate; 0 only scores the prompt.
    temperature: 0 takes the likeliest token; else logits are divided by it. 0 to 2.
    top_k: keep the k likeliest tokens, 0 = all. top_p: keep the likeliest tokens up to this mass, in (0, 1].
    min_p: drop tokens less likely than min_p times the likeliest, 0 to 1.
    seed: any int64; None lets the engine choose one. The same seed gives the same tokens, whatever else runs.
    stop: a string or a list of at most 16 of up to 1000 characters; the text ends before the first of them.
    n: how many continuations, 1 to 128.
    experts: also say which experts of a mixture gave each token.
    logprobs, prompt_logprobs: None = none; k = the token's own and the k likeliest, 0 to 20.
    presence_penalty, frequency_penalty: -2 to 2, over generated tokens.
    repetition_penalty: 0.01 to 10, prompt included.
    logit_bias: token id → number added to its logit, -100 to 100.
    min_tokens: no end of sequence before so many tokens. ignore_eos: go on after an end of sequence.
    beam_width: 1 to 4096, at most the tokens of a step. Above 1, beam search is used: it is deterministic and takes
        only max_tokens, min_tokens, ignore_eos, stop and length_penalty, and n (at most beam_width) says how many
        beams are returned. The temperature, top_k, top_p, min_p, seed, the penalties on tokens and logit_bias are
        then not used.
    length_penalty: beam search divides a score by length ** length_penalty; above 0 favours long text. -10 to 10.
    constraint: what the text must be: {"json_object": True}, {"json_schema": …}, {"regex": …} or {"grammar": …}
        (`read_constraint`). The sequence ends where it is complete. Not with beams, nor with ignore_eos.

    Whole numbers are accepted where a float is asked; a bool or a string is never a number.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    beam_width: int = 1
    length_penalty: float = 1.0
    constraint: Constraint | Mapping[str, Any] | None = None
    experts: bool = False

    def __post_init__(self) -> None:
        for name, (kind, optional, low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            object.__setattr__(self, name, _number(name, name, value, kind, low, high, name in _ABOVE_ZERO))
        for name in ("ignore_eos", "experts"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} = {shown(getattr(self, name))}: expected true or false", name)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens = {self.min_tokens}: expected at most max_tokens = {self.max_tokens}", "min_tokens"
            )
        if self.beam_width > 1 and self.n > self.beam_width:
            raise RequestError(f"n = {self.n}: expected at most beam_width = {self.beam_width}", "n")
        object.__setattr__(self, "constraint", read_constraint(self.constraint))
        if self.constraint is not None and (self.beam_width > 1 or self.ignore_eos):
            raise RequestError("constraint: expected neither beam_width above 1 nor ignore_eos beside it", "constraint")

    def check_vocabulary(self, vocab_size: int) -> None:
        """RequestError where logit_bias names a token id that a vocabulary of `vocab_size` does not have."""
        for token in self.logit_bias or ():
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"logit_bias: token id {shown(token)} is outside the vocabulary, 0 to {vocab_size - 1}",
                    "logit_bias",
                )


def _number(param: str, name: str, value: Any, kind: type, low: float, high: float, above_low: bool = False) -> Any:
    wanted: Any = Integral if kind is int else Real
    fits = isinstance(value, wanted) and not isinstance(value, bool) and low <= value <= high
    number = kind(value) if fits else low
    if not fits or (above_low and number == low):
        noun = "a whole number" if kind is int else "a number"
        interval = f"above {low} up to {high}" if above_low else f"from {low} to {high}"
        raise RequestError(f"{name} = {shown(value)}: expected {noun} {interval}", param)
    return number


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(stops, (list, tuple)):
        raise RequestError(f"stop = {shown(stop)}: expected a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} strings: expected at most {MAX_STOPS}", "stop")
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise RequestError(
                f"stop holds {shown(text)}: expected strings of 1 to {MAX_STOP_LENGTH} characters", "stop"
            )
    return tuple(stops)


def _logit_bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias = {shown(bias)}: expected a mapping of token ids to numbers", "logit_bias")
    checked = {}
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"logit_bias has the key {shown(token)}: expected a token id", "logit_bias")
        checked[int(token)] = _number(
            "logit_bias", f"logit_bias[{shown(token)}]", value, float, -_BIAS_LIMIT, _BIAS_LIMIT
        )
    return checked
