"""`maestrale merge`: an adapter into the weights of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option


def merge(
    model: Annotated[Path, Argument(help="The model folder that the adapter was made for.")],
    adapter: Annotated[Path, Argument(help="The adapter: a folder of PEFT's or native, or a native file.")],
    out: Annotated[Path, Argument(help="The folder to write: whole, or not at all.")],
    to: Annotated[str, Option(help="The layout to write.", metavar="native|hf")] = "native",
    dtype: Annotated[
        str, Option(help="Of all weights: float32, bfloat16 or float16; auto keeps each tensor's own.")
    ] = "auto",
    force: Annotated[bool, Option("--force", help="Replace what OUT holds.")] = False,
) -> None:
    """Write the model with a LoRA or DoRA adapter in its weights.

    Tensor by tensor; sums are fp32 and rounded once. To run adapters unmerged, several at once:
    LLM(path, adapters={name: folder}).
    """
    from maestrale.checkpoint.convert import convert
    from maestrale.launch import model_folder

    with opt.progress_line("merging") as progress:
        convert(model_folder(model), out, to, dtype, force, progress=progress, adapter=adapter)
    print(f"{out}: {model} with {adapter}")
