"""What several verbs share, said once: options, how a model is opened, how sizes are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maestrale.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from maestrale.llm import LLM

MODEL, SAMPLING = "Model", "Sampling"  # panels of the help screens

Model = Annotated[
    Path | None, typer.Argument(help="A model folder; without one, the bundled model.", show_default=False)
]
Dtype = Annotated[
    str, typer.Option(help="Compute in float32, bfloat16, float16 or auto (as stored).", rich_help_panel=MODEL)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …", rich_help_panel=MODEL)]
Weights = Annotated[
    str, typer.Option(help="auto (as stored), bf16, int8 or int4 (quantized while loading).", rich_help_panel=MODEL)
]
Backend = Annotated[
    str, typer.Option(help="auto (torch on a GPU, else native), native or torch.", rich_help_panel=MODEL)
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads of the native backend; all cores where not said.", show_default=False, rich_help_panel=MODEL
    ),
]
MaxLen = Annotated[
    int | None,
    typer.Option(help="Longest prompt and completion together, in tokens.", show_default=False, rich_help_panel=MODEL),
]
MaxBatchTokens = Annotated[
    int | None, typer.Option(help="Most tokens computed in one step.", show_default=False, rich_help_panel=MODEL)
]
PipelineRanks = Annotated[
    int | None,
    typer.Option(
        "--num-pipeline-ranks", help="Under torchrun: stages of layers.", show_default=False, rich_help_panel=MODEL
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(help="Under torchrun: shards of each layer.", show_default=False, rich_help_panel=MODEL),
]
ExpertParallel = Annotated[
    int, typer.Option(help="Under torchrun: groups that a mixture's experts are divided into.", rich_help_panel=MODEL)
]
DistributedTimeout = Annotated[
    float,
    typer.Option(
        help="Under torchrun: seconds after which a rank that does not answer counts as hanging.", rich_help_panel=MODEL
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="A LoRA adapter to run the model with, unmerged.", show_default=False, rich_help_panel=MODEL),
]
IgnoreUnexpected = Annotated[
    bool,
    typer.Option(
        "--ignore-unexpected",
        help="Go on where the files hold tensors that the model has no place for.",
        rich_help_panel=MODEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate for a prompt.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token, 1 draws as the model says.", rich_help_panel=SAMPLING)
]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest only; 0 is all.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest up to this share of probability.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(help="Leave out tokens less likely than this share of the likeliest.", rich_help_panel=SAMPLING),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, tokens that stand already become less likely.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None, typer.Option(help="The same seed draws the same text.", show_default=False, rich_help_panel=SAMPLING)
]


def open_llm(path: Path | None, **options: Any) -> LLM:
    """The model, with a line of progress on the terminal while it loads."""
    from maestrale.llm import LLM

    with progress_line("loading") as progress:
        return LLM(path, require_tokenizer=True, progress=progress, **options)


@contextmanager
def progress_line(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that keeps a bar on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; - is standard input. UsageError where it cannot be read."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None


def readable_bytes(size: int) -> str:
    """Three digits and a binary unit: 13.5 GiB, 512 MiB, 948 bytes."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 999.5 or unit == "GiB":
            break
        amount /= 1024
    decimals = 0 if unit == "bytes" or amount >= 99.95 else 1 if amount >= 9.995 else 2
    return f"{amount:,.{decimals}f} {unit}"
