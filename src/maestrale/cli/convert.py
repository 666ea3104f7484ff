"""`maestrale convert`: a model folder in another layout or dtype."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from maestrale.cli import options as opt


def convert(
    src: Annotated[Path, typer.Argument(help="A model folder, native or Hugging Face.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write: whole, or not at all.")],
    to: Annotated[str, typer.Option(help="The layout to write.", metavar="native|hf")],
    dtype: Annotated[
        str, typer.Option(help="Of all weights: float32, bfloat16 or float16; auto keeps each tensor's own.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what DST holds.")] = False,
    ignore_unexpected: opt.IgnoreUnexpected = False,
) -> None:
    """Write a model folder in another layout, with its tokenizer. Native to hf and back is exact, bit for bit.

    Memory holds one tensor at a time. NaN or Inf in the weights is an error. SRC is only read.
    """
    from maestrale.checkpoint import convert as conversion
    from maestrale.text.tokenizer import is_tokenizer_file

    tensors, written, start = 0, 0, time.perf_counter()
    with opt.progress_line("converting") as show:

        def progress(done: int, total: int) -> None:
            nonlocal tensors, written
            tensors, written = tensors + 1, done
            show(done, total)

        conversion.convert(src, dst, to, dtype, force, ignore_unexpected, progress)
    seconds = time.perf_counter() - start
    if not any(is_tokenizer_file(path.name) for path in dst.iterdir()):
        warnings.warn(f"{src}: holds no tokenizer, so {dst} has none", stacklevel=1)
    print(f"{dst}: {tensors} tensors, {opt.readable_bytes(written)}, {seconds:.1f} s")
