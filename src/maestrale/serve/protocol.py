"""What a client may send, field by field: types here, strictly; ranges in SamplingParams and the tokenizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from maestrale.sampling.params import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams, limits
from maestrale.serve.problems import bad_request
from maestrale.text.chat import ROLES

MAX_PROMPTS = 1024  # in one request, each of the n counted
_WHOLE_CONTEXT = 2**31 - 1

# Fields that SamplingParams has under the same name and with the same meaning.
_SAME = (
    *("temperature", "top_p", "min_p", "n", "stop", "min_tokens", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object that has these properties, perhaps among others."""
    return {"type": "object", "required": list(properties), "properties": properties}


_STRING = {"type": "string"}
_PARTS = {"type": "array", "items": _object(type={"const": "text"}, text=_STRING)}
# What a message is, read_messages (text/chat.py) says; this is its description.
Message = Annotated[Any, WithJsonSchema(_object(role={"enum": list(ROLES)}, content={"anyOf": [_STRING, _PARTS]}))]
# Likewise the parts of a chat that text/tools.py and serve/tools.py read.
_FUNCTION = _object(type={"const": "function"}, function=_object(name=_STRING))
Tool = Annotated[Any, WithJsonSchema(_FUNCTION)]
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["auto", "none", "required", None]}, _FUNCTION]})]
_FORMATS = [
    *({"type": "null"}, _object(type={"enum": ["text", "json_object"]})),
    _object(type={"const": "json_schema"}, json_schema=_object(schema={"type": "object"})),
    _object(type={"const": "regex"}, regex=_STRING),
    _object(type={"const": "grammar"}, grammar=_STRING),
]
ResponseFormat = Annotated[Any, WithJsonSchema({"anyOf": _FORMATS})]


def _ranged(name: str) -> Any:
    low, high = limits(name)
    return Field(None, json_schema_extra={"minimum": low, "maximum": high})


class Body(BaseModel):
    """A JSON object; unknown fields are kept aside, to be named in a header."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Sampling(Body):
    """The fields that chats and completions share."""

    model: str | None = None
    max_tokens: int | None = Field(None, json_schema_extra={"minimum": 1, "maximum": limits("max_tokens")[1]})
    temperature: float | None = _ranged("temperature")
    top_p: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    top_k: int | None = Field(None, json_schema_extra={"minimum": -1, "maximum": limits("top_k")[1]})
    min_p: float | None = _ranged("min_p")
    n: int | None = _ranged("n")
    seed: int | None = _ranged("seed")
    random_seed: int | None = _ranged("seed")
    stop: str | list[str] | None = Field(None, json_schema_extra={"maxLength": MAX_STOP_LENGTH, "maxItems": MAX_STOPS})
    presence_penalty: float | None = _ranged("presence_penalty")
    frequency_penalty: float | None = _ranged("frequency_penalty")
    repetition_penalty: float | None = _ranged("repetition_penalty")
    logit_bias: dict[str, float] | None = Field(None, description="token id → -100 to 100")
    min_tokens: int | None = Field(None, json_schema_extra={"minimum": 0})
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    model_view: bool | None = Field(None, description="Also tell experts and the cache's filling: docs/chat.md")
    user: str | None = None

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, default_max_tokens: int | None, **more: Any) -> SamplingParams:
        """The sampling that is asked for. default_max_tokens: None is all that the context holds."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: only with stream = true", "stream_options")
        if self.seed is not None and self.random_seed is not None and self.seed != self.random_seed:
            raise bad_request(f"seed = {self.seed}, random_seed = {self.random_seed}: two names of one thing", "seed")
        given: dict[str, Any] = {
            "max_tokens": self._max_tokens(default_max_tokens),
            "seed": self.random_seed if self.seed is None else self.seed,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "logit_bias": None if self.logit_bias is None else dict(map(_bias, self.logit_bias.items())),
        }
        given |= {name: getattr(self, name) for name in _SAME} | {"experts": self.model_view} | more
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    def _max_tokens(self, default: int | None) -> int:
        return _positive("max_tokens", self.max_tokens, default)


class ChatRequest(Sampling):
    messages: list[Message] = Field(json_schema_extra={"minItems": 1})
    max_completion_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    logprobs: bool | None = None
    top_logprobs: int | None = _ranged("logprobs")
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat = None

    def _max_tokens(self, default: int | None) -> int:
        newer = self.max_completion_tokens
        if newer is not None and self.max_tokens not in (None, newer):
            raise bad_request("max_tokens and max_completion_tokens differ: two names of one thing", "max_tokens")
        return super()._max_tokens(default) if newer is None else _positive("max_completion_tokens", newer, default)

    def chat_params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs: only with logprobs = true", "top_logprobs")
        _at_most("top_logprobs", self.top_logprobs, *limits("logprobs"))
        return self.params(None, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = _ranged("logprobs")
    best_of: int | None = Field(None, json_schema_extra={"minimum": 1})
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids for each prompt."""
        prompts = _one_or_many("prompt", self.prompt)
        if len(prompts) * max(self.n or 1, 1) > MAX_PROMPTS:
            raise bad_request(f"{len(prompts)} prompts, n = {self.n or 1}: at most {MAX_PROMPTS} answers", "prompt")
        return prompts

    def completion_params(self) -> SamplingParams:
        if self.best_of not in (None, self.n or 1):
            raise bad_request(f"best_of = {self.best_of}: only best_of = n is served", "best_of")
        if self.suffix:
            raise bad_request("suffix: send it to /v1/fim/completions", "suffix")
        return self.params(16, logprobs=self.logprobs, prompt_logprobs=self.logprobs if self.echo else None)


class FimRequest(Sampling):
    """Fill in the middle: what stands between prompt and suffix."""

    prompt: str
    suffix: str | None = None


class EmbeddingsRequest(Body):
    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, json_schema_extra={"minimum": 1})
    user: str | None = None

    def texts(self) -> list[str | list[int]]:
        """One text or list of token ids for each vector."""
        texts = _one_or_many("input", self.input)
        if len(texts) > MAX_PROMPTS:
            raise bad_request(f"input: {len(texts)} texts, at most {MAX_PROMPTS}", "input")
        return texts


class TokenizeRequest(Body):
    """Either prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


def _one_or_many(name: str, given: Any) -> list[str | list[int]]:
    if not given and not isinstance(given, str):
        raise bad_request(f"{name}: an empty list", name)
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _positive(name: str, value: int | None, default: int | None) -> int:
    if value is not None and value < 1:
        raise bad_request(f"{name} = {value}: expected a whole number of at least 1", name)
    return (default or _WHOLE_CONTEXT) if value is None else value


def _at_most(name: str, value: int | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise bad_request(f"{name} = {value}: expected a whole number from {low:g} to {high:g}", name)


def _bias(item: tuple[str, float]) -> tuple[int, float]:
    key, value = item
    if not (key.isascii() and key.isdecimal() and len(key) < 19):
        raise bad_request(f"logit_bias has the key {key[:80]!r}: expected a token id", "logit_bias")
    return int(key), value
