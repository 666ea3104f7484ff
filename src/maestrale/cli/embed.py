"""`maestrale embed` and `maestrale classify`: texts to vectors, and to classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option
from maestrale.errors import UsageError

if TYPE_CHECKING:
    from maestrale.reader import Reader

Texts = Annotated[list[str] | None, Option("--text", "-t", help="A text; may be given again.")]
File = Annotated[
    Path | None,
    Option(help="A file with a text a line (.jsonl: strings, or objects with text); - is standard input."),
]

MaxLen = Annotated[int | None, Option(help="Longest text, in tokens.", group=opt.MODEL)]


def embed(
    running: opt.Running,
    path: opt.Model = None,
    text: Texts = None,
    texts: File = None,
    max_len: MaxLen = None,
) -> None:
    """Print the embedding of each text, one JSON object a line.

    It is the mean of its tokens' last hidden states. Each token sees those before it, as the model was trained.
    """
    found = _texts(text, texts)
    for one, vector in zip(found, _reader(path, False, running, max_len).embed(found), strict=True):
        print(json.dumps({"text": one, "embedding": [float(f"{value:.7g}") for value in vector]}, ensure_ascii=False))


def classify(
    running: opt.Running,
    path: Annotated[Path, Argument(help="A folder that finetune --task classify wrote.")],
    text: Texts = None,
    texts: File = None,
    max_len: MaxLen = None,
    as_json: opt.Json = False,
) -> None:
    """Print the likeliest class of each text and its probability.

    With --json those of all classes.
    """
    found = _texts(text, texts)
    for one, shares in zip(found, _reader(path, True, running, max_len).classify(found), strict=True):
        label, share = next(iter(shares.items()))
        if as_json:
            print(json.dumps({"text": one, "label": label, "probabilities": shares}, ensure_ascii=False))
        else:
            print(f"{label} {share:.3f}  {' '.join(one.split())[:100]}")


def _reader(path: Path | None, classes: bool, running: opt.Running, max_len: int | None) -> Reader:
    from maestrale.reader import Reader

    with opt.progress_line("loading") as progress:
        return Reader(path, classes, max_len=max_len, require_tokenizer=True, progress=progress, **vars(running))


def _texts(given: list[str] | None, file: Path | None) -> list[str]:
    found = list(given or [])
    if file is not None:
        for number, line in enumerate(opt.read_text(file).splitlines(), 1):
            if line.strip():
                found.append(_line(file, number, line) if file.suffix == ".jsonl" else line)
    if not found:
        raise UsageError("no text: give one with -t TEXT, or many with --texts FILE")
    return found


def _line(file: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{file}:{number}: not JSON: {error}") from None
    value = value.get("text") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise UsageError(f'{file}:{number}: expected a string, or an object with a string as its "text"')
    return value
