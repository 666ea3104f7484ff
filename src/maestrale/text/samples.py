"""Training data: JSON lines (or Parquet rows) to token ids, with how much each is to be learnt; every bad line at once.

A line is one of

- `{"text": …}`: all of it is learnt;
- `{"messages": [{"role", "content", "tool_calls", "weight"} …], "tools": […]}`, as OpenAI and mistral-finetune have
  it: the assistant's messages are learnt, each by its weight (1 where it has none, 0 skips it);
- for preferences `{"prompt", "chosen", "rejected"}` (texts or lists of messages), or OpenAI's
  `{"input": {"messages"}, "preferred_output", "non_preferred_output"}`;
- for classification `{"text" or "messages", "label"}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.jsonfile import parse_json
from maestrale.errors import CheckpointError, DataError, RequestError, UsageError, first_line, shown
from maestrale.text.tokenizer import Tokenizer
from maestrale.text.vocabulary import require_text

_MAX_LINE = 100_000_000  # bytes


@dataclass(frozen=True)
class Row:
    """A line, counted from 1, that could be read (`value`), or why it could not (`cause`)."""

    line: int
    value: dict[str, Any]
    cause: str = ""


@dataclass(frozen=True, eq=False)
class Sample:
    """ids: int32. weights: float32, of each id as something to learn. whole: it makes no sense cut in two."""

    line: int
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    whole: bool


@dataclass(frozen=True, eq=False)
class Pair:
    """An answer that is preferred to another one; weights are 1 in the answers."""

    line: int
    chosen: Sample
    rejected: Sample


@dataclass(frozen=True, eq=False)
class Labelled:
    """A text and the class that it belongs to."""

    line: int
    ids: NDArray[np.int32]
    label: str


@dataclass(frozen=True)
class Fault:
    line: int
    cause: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file; empty lines are none. UsageError where there is nothing to read at all."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with open(path, "rb") as file:
            number = 0
            while content := file.readline(_MAX_LINE + 1):
                number += 1
                if len(content) > _MAX_LINE:
                    raise UsageError(f"{path}:{number}: a line of more than {_MAX_LINE:,} bytes; expected JSON lines")
                if number == 1:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                if content.strip():
                    yield _row(number, content)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the data: {error.strerror or error}") from None


def read_samples(path: str | Path, tokenizer: Tokenizer, task: str) -> tuple[list[Any], list[Fault]]:
    """(Samples, Pairs or Labelled, as the task asks; lines that cannot be used, with the cause of each)."""
    samples: list[Any] = []
    faults: list[Fault] = []
    for row in read_rows(Path(path)):
        if row.cause:
            faults.append(Fault(row.line, row.cause))
            continue
        try:
            samples.append(READERS[task](row, tokenizer))
        except RequestError as error:
            faults.append(Fault(row.line, str(error)))
    return samples, faults


def require_samples(path: str | Path, tokenizer: Tokenizer, task: str) -> list[Any]:
    """As `read_samples`; DataError that names every bad line (of very many, the first) and DataError for no sample."""
    samples, faults = read_samples(path, tokenizer, task)
    if faults:
        told = "; ".join(f"{path}:{fault.line}: {fault.cause}" for fault in faults[:20])
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError(f"{len(faults)} bad lines: {told}{more} (maestrale data check {path} lists all)")
    if not samples:
        raise DataError(f"{path}: holds no sample")
    return samples


def read_sample(row: Row, tokenizer: Tokenizer) -> Sample:
    value = row.value
    if ("text" in value) == ("messages" in value):
        raise RequestError('expected either "text" or "messages"' + _keys(value))
    if "text" in value:
        ids = [*tokenizer.encode(_words(value["text"], "text")), tokenizer.eos_id]
        return _sample(row.line, ids, [0.0, *[1.0] * (len(ids) - 1)], whole=False)
    sample = _sample(row.line, *tokenizer.encode_conversation(value["messages"], value.get("tools")), whole=True)
    if not sample.weights.any():
        raise RequestError("nothing to learn: every assistant's message has weight 0")
    return sample


def read_pair(row: Row, tokenizer: Tokenizer) -> Pair:
    value = row.value
    if "input" in value:
        given = value["input"]
        prompt = given.get("messages") if isinstance(given, Mapping) else None
        tools = given.get("tools") if isinstance(given, Mapping) else None
        answers = [value.get("preferred_output"), value.get("non_preferred_output")]
        names = ("preferred_output", "non_preferred_output")
    else:
        prompt, tools = value.get("prompt"), value.get("tools")
        answers, names = [value.get("chosen"), value.get("rejected")], ("chosen", "rejected")
    pair = [
        _answered(row.line, prompt, answer, tools, name, tokenizer) for answer, name in zip(answers, names, strict=True)
    ]
    if np.array_equal(pair[0].ids, pair[1].ids):
        raise RequestError(f"{names[0]} and {names[1]} are the same")
    return Pair(row.line, *pair)


def read_labelled(row: Row, tokenizer: Tokenizer) -> Labelled:
    value = row.value
    label = value.get("label")
    if type(label) not in (str, int) or not str(label).strip():
        raise RequestError(f"label = {shown(label)}: expected a word or a whole number")
    if ("text" in value) == ("messages" in value):
        raise RequestError('expected either "text" or "messages"' + _keys(value))
    if "text" in value:
        ids = tokenizer.encode(_words(value["text"], "text"))
    else:
        ids = tokenizer.encode_chat(value["messages"], value.get("tools"))
    return Labelled(row.line, np.array(ids, np.int32), str(label))


READERS: dict[str, Callable[[Row, Tokenizer], Any]] = {"lm": read_sample, "dpo": read_pair, "classify": read_labelled}
TASKS = tuple(READERS)


def _answered(line: int, prompt: Any, answer: Any, tools: Any, name: str, tokenizer: Tokenizer) -> Sample:
    """A prompt with one answer to it: texts are a user's message and the assistant's, lists are messages."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    for part, what in ((before, "prompt"), (after, name)):
        if not isinstance(part, list) or not part or not all(isinstance(message, Mapping) for message in part):
            raise RequestError(f"{what}: expected a text or a list of messages, got {shown(part)}")
    # What the prompt's own assistant said is given, not learnt.
    given = [dict(m) | {"weight": 0} if m.get("role") == "assistant" else m for m in before]
    ids, weights = tokenizer.encode_conversation([*given, *after], tools)
    sample = _sample(line, ids, weights, whole=True)
    if not sample.weights.any():
        raise RequestError(f"{name}: holds no answer of the assistant")
    return sample


def _sample(line: int, ids: Sequence[int], weights: Sequence[float], whole: bool) -> Sample:
    return Sample(line, np.array(ids, np.int32), np.array(weights, np.float32), whole)


def _words(text: Any, name: str) -> str:
    if not require_text(text, name).strip():
        raise RequestError(f"{name}: is empty")
    return str(text)


def _keys(value: Mapping[str, Any]) -> str:
    return f", found {', '.join(sorted(value)) or 'no key'}"[:80]


def _row(number: int, content: bytes) -> Row:
    try:
        return Row(number, parse_json(content, ""))
    except CheckpointError as error:
        return Row(number, {}, str(error).removeprefix(": "))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f"{path}: Parquet needs pyarrow: pip install 'maestrale[parquet]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, {key: field for key, field in value.items() if field is not None})
    except (OSError, ArrowException) as error:
        raise UsageError(f"{path}: cannot read the data: {first_line(error)}") from None
