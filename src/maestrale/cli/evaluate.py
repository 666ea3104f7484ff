"""`maestrale eval`: perplexity of a text, read with the windows the model has; with --choices, right answers."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from maestrale.cli import options as opt
from maestrale.cli.choices import KEYS, Question, Segment, accuracy, read_questions, segments
from maestrale.cli.declare import Argument, Option
from maestrale.errors import CheckpointError, UsageError
from maestrale.values import MAX_SIZE

if TYPE_CHECKING:
    from maestrale.llm import LLM

_MOST_NATS = 700  # whose perplexity is still a float


def evaluate(
    running: opt.Running,
    file: Annotated[Path, Argument(help="A UTF-8 text file; - is standard input. Or a .jsonl file.")],
    model: Annotated[
        Path | None,
        Option(help="A model folder; without one, the bundled model.", group=opt.MODEL),
    ] = None,
    documents: Annotated[
        bool, Option("--documents", help="Three line feeds part the file into texts of their own.")
    ] = False,
    choices: Annotated[
        bool,
        Option("--choices", help="The file holds questions: which of the choices does the model find likeliest?"),
    ] = False,
    keys: Annotated[
        str, Option(help="Of questions: the names of the query, the choices and the right one's number.")
    ] = ",".join(KEYS),
    delimiter: Annotated[str, Option(help="Of questions: what stands between a query and a choice.")] = " ",
    max_len: Annotated[
        int | None,
        Option(
            help="Most tokens read in one go; without it the model's context, or all where every layer has a window.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        Option(help="New tokens in each segment of a longer text; half of them by default."),
    ] = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    as_json: opt.Json = False,
) -> None:
    """Score a text: nats per token, perplexity, bits per byte. With --choices, multiple choice: acc, acc_norm.

    A model with a window in every layer reads a text of any length in one go; its cache keeps its size. Any other
    reads segments of at most its context; each begins with tokens of the one before, which are not scored again.

    Questions stand in a .jsonl or .parquet file, one a line: {"query": "…", "choices": ["…", "…"], "gold": 0}.
    """
    if choices and (documents or stride is not None):
        raise UsageError("--choices: expected neither --documents nor --stride")
    questions = _questions(file, keys) if choices else []
    texts = [] if choices else _texts(file, documents)
    if stride is not None and stride < 1:
        raise UsageError(f"--stride {stride}: expected a whole number of at least 1")
    if max_len is None and _has_window_everywhere(model, running.ignore_unexpected):
        max_len = MAX_SIZE
    llm = running.open(model, max_len=max_len, max_batch_tokens=max_batch_tokens, prefix_cache=False)
    if llm.max_len < 2:
        raise UsageError(f"--max-len {llm.max_len}: at least 2 tokens are needed to score one")
    if stride is not None and stride >= llm.max_len:
        raise UsageError(f"--stride {stride}: expected less than the {llm.max_len} tokens read in one go")
    if choices:
        facts = accuracy(questions, read(llm, segments(llm, file, questions, delimiter)))
    else:
        facts = _perplexity(llm, file, texts, stride or llm.max_len // 2)
    print(json.dumps(facts) if as_json else (_told_choices if choices else _told)(facts))


def _questions(file: Path, keys: str) -> list[Question]:
    names = keys.split(",")
    if len(names) != 3:
        raise UsageError(f"--keys {keys}: expected three names, parted by commas")
    return read_questions(file, names)


def _texts(file: Path, documents: bool) -> list[str]:
    content = opt.read_text(file)
    texts = [text for text in (content.split("\n\n\n") if documents else [content]) if text]
    if not texts:
        raise UsageError(f"{file}: holds no text")
    return texts


def _perplexity(llm: LLM, file: Path, texts: list[str], stride: int) -> dict[str, Any]:
    """What `--json` prints. Bytes are those of the texts; each text's begin-of-text token is given, not scored."""
    start = time.perf_counter()
    logprobs = score(llm, [part for text in texts for part in cut(llm.tokenizer.encode(text), llm.max_len, stride)])
    if not logprobs:
        raise UsageError(f"{file}: holds no token to score")
    seconds, n_bytes = time.perf_counter() - start, sum(len(text.encode()) for text in texts)
    nats = -math.fsum(logprobs)
    mean = nats / len(logprobs)
    if mean > _MOST_NATS:
        raise CheckpointError(f"{mean} nats per token: the model or its weights are damaged; inspect --check-tensors")
    return {
        "tokens": len(logprobs),
        "bytes": n_bytes,
        "nats_per_token": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "seconds": seconds,
        "tokens_per_second": len(logprobs) / seconds,
    }


def cut(ids: list[int], max_len: int, stride: int) -> Iterator[Segment]:
    """Segments of at most `max_len` tokens, each `stride` beyond the last one, that score every id but the first.

    0 < stride < max_len.
    """
    end = min(max_len, len(ids))
    yield Segment(ids[:end], 1)
    while end < len(ids):
        before, end = end, min(end + stride, len(ids))
        first = max(0, end - max_len)
        yield Segment(ids[first:end], before - first)


def score(llm: LLM, parts: list[Segment]) -> list[float]:
    """Natural logprobs of all scored tokens, in order."""
    return [logprob for found in read(llm, parts) for logprob in found]


def read(llm: LLM, parts: list[Segment]) -> list[list[float]]:
    """Natural logprobs of each segment's scored tokens."""
    from maestrale.sampling.params import SamplingParams

    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with opt.progress_line("reading") as progress:
        answers = llm.generate([part.ids for part in parts], params, progress=progress)
    return [
        [logprob for logprob in (answer.prompt_logprobs or [])[part.given :] if logprob is not None]
        for part, answer in zip(parts, answers, strict=True)
    ]


def _told(facts: dict[str, Any]) -> str:
    return (
        f"{facts['tokens']:,} tokens, {facts['bytes']:,} bytes: {facts['nats_per_token']:.4f} nats per token, "
        f"perplexity {facts['perplexity']:.4f}, {facts['bits_per_byte']:.4f} bits per byte "
        f"({facts['seconds']:.1f} s, {facts['tokens_per_second']:,.0f} tokens/s)"
    )


def _told_choices(facts: dict[str, Any]) -> str:
    shares = ", ".join(_share(facts, name) for name in ("acc", "acc_norm"))
    return f"{facts['questions']:,} questions: {shares}"


def _share(facts: dict[str, Any], name: str) -> str:
    error = facts[f"{name}_stderr"]
    return f"{name} {facts[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _has_window_everywhere(model: Path | None, ignore_unexpected: bool) -> bool:
    from maestrale.checkpoint.reader import open_checkpoint
    from maestrale.launch import model_folder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opening the model warns
        with open_checkpoint(model_folder(model), ignore_unexpected) as checkpoint:
            return all(checkpoint.config.sliding_window)
