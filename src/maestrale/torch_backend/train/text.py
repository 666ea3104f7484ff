"""Text files to documents, and a SentencePiece tokenizer learnt from them."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from maestrale.checkpoint.jsonfile import read_bounded
from maestrale.errors import CheckpointError, UsageError

_SEPARATOR = "\n\n\n"  # paragraphs are separated by one empty line, documents by two
_PARAGRAPHS = 8  # learnt from at a time


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns name, sorted by name. UsageError for a pattern that names none."""
    found: set[str] = set()
    for pattern in patterns:
        matches = [name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        if not matches:
            raise UsageError(f"data.train: {pattern}: no such file; --data names the training text")
        found.update(matches)
    return [Path(name) for name in sorted(found, key=lambda name: (Path(name).name, name))]


def read_documents(paths: Iterable[Path]) -> list[str]:
    """Every document of every file, in order, without the line feeds around it."""
    documents: list[str] = []
    for path in paths:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: byte {error.start}: not UTF-8; convert the file") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot read the text: {error.strerror}") from None
        parts = (part.strip("\n") for part in text.replace("\r\n", "\n").split(_SEPARATOR))
        documents += [part for part in parts if part]
    if not documents:
        raise UsageError(f"{', '.join(map(str, paths))}: no text")
    return documents


def train_tokenizer(documents: Sequence[str], vocab_size: int, threads: int) -> bytes:
    """A SentencePiece model: byte-pair pieces, bytes for what they miss, so that every text comes back as it was.

    Line feeds are pieces of their own, one and two of them: a paragraph's end is one token.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_excerpts(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n\n", "\n"],
            max_sentence_length=1 << 24,
            num_threads=threads,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"model.vocab_size = {vocab_size}: cannot learn a tokenizer: {reason}") from None
    return model.getvalue()


def _excerpts(documents: Sequence[str]) -> Iterator[str]:
    for document in documents:
        paragraphs = document.split("\n\n")
        for i in range(0, len(paragraphs), _PARAGRAPHS):
            yield "\n\n".join(paragraphs[i : i + _PARAGRAPHS]) + "\n\n"


def load_pieces(path: Path, vocab_size: int) -> Any:
    """The SentencePieceProcessor of a file. CheckpointError if it is damaged or has not `vocab_size` pieces."""
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_proto=read_bounded(path))
    except RuntimeError:
        raise CheckpointError(f"{path}: damaged, or no SentencePiece model") from None
    if pieces.get_piece_size() != vocab_size:
        raise CheckpointError(
            f"{path}: {pieces.get_piece_size()} pieces, but model.vocab_size is {vocab_size}: make them equal"
        )
    return pieces
