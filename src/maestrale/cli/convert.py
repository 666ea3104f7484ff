"""`maestrale convert`: a model folder in another layout or dtype."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option
from maestrale.errors import UsageError


def convert(
    src: Annotated[Path, Argument(help="A model folder, native, Hugging Face or packed, or a GGUF file.")],
    dst: Annotated[Path, Argument(help="The folder, or .gguf file, to write: whole, or not at all.")],
    to: Annotated[str, Option(help="The layout to write.", metavar="native|hf|gguf")],
    dtype: Annotated[
        str, Option(help="Of all weights: float32, bfloat16 or float16; auto keeps each tensor's own.")
    ] = "auto",
    weights: Annotated[str, Option(help="Of a GGUF file's linear layers.", metavar="bf16|q8_0|q4_0")] = "bf16",
    force: Annotated[bool, Option("--force", help="Replace what DST holds.")] = False,
    ignore_unexpected: opt.IgnoreUnexpected = False,
) -> None:
    """Write a model folder in another layout, or as a GGUF file, with its tokenizer.

    Native to hf and back is exact, bit for bit. A GGUF file's embeddings and head are q8_0 at the least.

    Memory holds one tensor at a time. NaN or Inf in the weights is an error. SRC is only read.
    """
    from maestrale.checkpoint import convert as conversion
    from maestrale.checkpoint import gguf_writer
    from maestrale.launch import model_folder
    from maestrale.text.tokenizer import is_tokenizer_file

    src = model_folder(src)
    tensors, written, start = 0, 0, time.perf_counter()
    with opt.progress_line("converting") as show:

        def progress(done: int, total: int) -> None:
            nonlocal tensors, written
            tensors, written = tensors + 1, done
            show(done, total)

        if to == "gguf":
            if dtype != "auto":
                raise UsageError("--dtype is for native and hf folders; a GGUF file takes --weights")
            gguf_writer.convert_to_gguf(src, dst, weights, force, ignore_unexpected, progress)
        else:
            if weights != "bf16":
                raise UsageError("--weights is for GGUF files; maestrale quantize writes a folder with fewer bits")
            conversion.convert(src, dst, to, dtype, force, ignore_unexpected, progress)
    seconds = time.perf_counter() - start
    if to != "gguf" and not any(is_tokenizer_file(path.name) for path in dst.iterdir()):
        warnings.warn(f"{src}: holds no tokenizer, so {dst} has none", stacklevel=1)
    print(f"{dst}: {tensors} tensors, {opt.readable_bytes(written)}, {seconds:.1f} s")
