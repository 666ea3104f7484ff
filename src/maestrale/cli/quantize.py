"""`maestrale quantize`: a model folder with fewer bits a weight."""

from __future__ import annotations

import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option
from maestrale.errors import UsageError

if TYPE_CHECKING:
    from maestrale.checkpoint.quantize import Quantizer


def quantize(
    src: Annotated[Path, Argument(help="A model folder, native or Hugging Face, or a GGUF file.")],
    dst: Annotated[Path, Argument(help="The folder to write: whole, or not at all.")],
    weights: Annotated[str, Option(help="Of the linear layers: int8 or int4.", metavar="int8|int4")],
    group: Annotated[int, Option(help="Inputs that share an int4 scale.", metavar="32|64|128")] = 32,
    head: Annotated[
        str | None,
        Option(help="Of the output layer, where it is to differ.", metavar="int8|int4"),
    ] = None,
    calibrate: Annotated[
        Path | None,
        Option(
            help="A UTF-8 text like those that the model is for: errors are kept small where it needs it (GPTQ; takes "
            "torch, memory and time).",
        ),
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace what DST holds.")] = False,
    ignore_unexpected: opt.IgnoreUnexpected = False,
) -> None:
    """Write a packed folder with int8 or int4 weights.

    That is about a half or a quarter of the size in bfloat16. int8 has a scale for each row, int4 one for each group
    of inputs; a layer whose inputs no group divides becomes int8. Norms, routers and embeddings stay as they are.
    Memory holds one tensor at a time. SRC is only read.
    """
    from maestrale.checkpoint import quantize as quantization
    from maestrale.checkpoint.reader import open_checkpoint
    from maestrale.choices import nearest_rounding
    from maestrale.launch import model_folder
    from maestrale.plan import count_parameters
    from maestrale.text.tokenizer import is_tokenizer_file

    src = model_folder(src)
    recipe, start = quantization.Recipe(weights, group, head), time.perf_counter()
    quantizer = nearest_rounding() if calibrate is None else _calibrated(src, calibrate, ignore_unexpected)
    with opt.progress_line("quantizing") as show:
        quantization.quantize(src, dst, recipe, quantizer, force, ignore_unexpected, show)
    seconds = time.perf_counter() - start
    if not any(is_tokenizer_file(path.name) for path in dst.iterdir()):
        warnings.warn(f"{src}: holds no tokenizer, so {dst} has none", stacklevel=1)
    with open_checkpoint(dst) as written:
        bits = written.stored_bits().total() / count_parameters(written.config)[0]
    size = sum(path.stat().st_size for path in dst.iterdir())
    print(f"{dst}: {opt.readable_bytes(size)}, {bits:.2f} bits a weight, {seconds:.1f} s")


def _calibrated(src: Path, file: Path, ignore_unexpected: bool) -> Quantizer:
    """What has read the text in `file`, or as much of it as it takes."""
    from maestrale.checkpoint.reader import open_checkpoint
    from maestrale.text.tokenizer import load_tokenizer

    text = opt.read_text(file)
    if find_spec("torch") is None:
        raise UsageError("--calibrate runs the model in torch: run  pip install 'maestrale[torch]'  or leave it out")
    from maestrale.torch_backend.gptq import LENGTH, SEQUENCES, Calibrated

    source = open_checkpoint(src, ignore_unexpected)  # stays open as long as the quantizer that reads it
    tokenizer = load_tokenizer(src, source.config.vocab_size)
    most = 20 * LENGTH * SEQUENCES  # characters: no tokenizer makes fewer tokens of so many
    return Calibrated(source, tokenizer.encode(text[:most], bos=False), tokenizer.bos_id)
