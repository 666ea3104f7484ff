"""Options that several verbs share, said once, and how those verbs open a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from maestrale.llm import LLM

Model = Annotated[Path | None, typer.Argument(help="A model folder; without one, the bundled model.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="Compute in auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Backend = Annotated[str, typer.Option(help="auto or torch.")]
MaxLen = Annotated[int | None, typer.Option(help="Longest prompt and completion together, in tokens.", show_default=False)]
MaxBatchTokens = Annotated[int | None, typer.Option(help="Most tokens computed in one step.", show_default=False)]
IgnoreUnexpected = Annotated[bool, typer.Option("--ignore-unexpected", help="Warn of tensors the model has no place for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate for a prompt.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, 1 draws as the model says.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest only; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest up to this share of probability.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, tokens that stand already become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.", show_default=False)]


def open_llm(path: Path | None, **options: Any) -> LLM:
    """The model, with a line of progress on the terminal while a large one loads."""
    from maestrale.llm import LLM

    with progress_line("loading") as progress:
        return LLM(path, require_tokenizer=True, progress=progress, **options)


@contextmanager
def progress_line(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that keeps a bar on standard error, where that is a terminal and it takes a while."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
