"""A Hugging Face folder with a tokenizer that transformers can read: converters want one, the comparison does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def with_tokenizer(source: Path) -> Iterator[Path]:
    """Links to the source's files, and a tokenizer of as many words as the model has."""
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    whole = {"version": "1.0", "added_tokens": [], "model": model} | dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in source.iterdir():
            if not file.name.startswith("tokenizer"):
                (folder / file.name).symlink_to(file.resolve())
        (folder / "tokenizer.json").write_text(json.dumps(whole))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        yield folder
