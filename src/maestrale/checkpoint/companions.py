"""The files beside a model's weights that it needs to be of use: its tokenizer's, and what goes with them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from maestrale.checkpoint.folder import GGUF
from maestrale.checkpoint.gguf_vocab import from_gguf, to_file
from maestrale.checkpoint.writer import copy_file, require_space, writing
from maestrale.errors import CheckpointError
from maestrale.text.tokenizer import is_tokenizer_file

_OTHERS = re.compile(r"tokenizer_config\.json|special_tokens_map\.json|generation_config\.json|chat_template.*")


def write_companions(source: Path, folder: Path, weight_bytes: int) -> None:
    """Copies them from the model at `source` to `folder`, once there is room for them and for the weights.

    A GGUF file's own vocabulary, where there is no other, becomes a tokenizer.model.
    """
    files = [path for path in sorted(source.iterdir()) if path.is_file()] if source.is_dir() else [source]
    found = [path for path in files if _OTHERS.fullmatch(path.name) or is_tokenizer_file(path.name)]
    require_space(folder, weight_bytes + sum(path.stat().st_size for path in found))
    for path in found:
        copy_file(path, folder / path.name)
    if any(is_tokenizer_file(path.name) for path in found):
        return
    for path in files:
        if path.suffix == GGUF:
            with suppress(CheckpointError):  # one of another kind stays behind, which the command line tells
                content = to_file(from_gguf(path))
                with writing(folder / "tokenizer.model") as write:
                    write(content)
