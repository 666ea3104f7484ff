"""What several verbs share, said once: options, how a model is opened, how sizes are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from maestrale.cli.declare import Argument, Option
from maestrale.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from maestrale.llm import LLM

MODEL, SAMPLING = "Model", "Sampling"  # groups of the help screens
_MAX_TEXT = 256 << 20  # bytes of a file that is read whole
TALKER = "stories-chat"  # the bundled model that has learnt to chat

Model = Annotated[
    Path | None,
    Argument(help="A model folder, a .gguf file, or stories, stories-moe, stories-chat; without one, a bundled model."),
]
Adapter = Annotated[Path | None, Option(help="A LoRA adapter to run the model with, unmerged.", group=MODEL)]
IgnoreUnexpected = Annotated[
    bool, Option(help="Go on where the files hold tensors that the model has no place for.", group=MODEL)
]
Json = Annotated[bool, Option("--json", help="Print JSON for programs.")]
Cache = Annotated[
    str, Option(help="Of keys and values: auto (as computed), or int8 (torch: fp8), half of bfloat16.", group=MODEL)
]
MaxTokens = Annotated[int, Option(help="Most tokens to generate for a prompt.")]
MaxBatchTokens = Annotated[int | None, Option(help="Most tokens computed in one step.", group=MODEL)]
Temperature = Annotated[float, Option(help="0 takes the likeliest token, 1 draws as the model says.", group=SAMPLING)]


@dataclass(frozen=True)
class Running:
    """How any verb runs a model: arguments of `LLM`, under its names."""

    dtype: Annotated[str, Option(help="Compute in float32, bfloat16, float16 or auto (as stored).", group=MODEL)] = (
        "auto"
    )
    weights: Annotated[
        str, Option(help="auto (as stored), bf16; quantized while loading: int8, int4, fp8 (Triton).", group=MODEL)
    ] = "auto"
    cache: Cache = "auto"
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:1 …", group=MODEL)] = "auto"
    backend: Annotated[str, Option(help="auto (torch on a GPU, else native), native or torch.", group=MODEL)] = "auto"
    threads: Annotated[
        int | None, Option(help="Threads of the native backend; all cores where not said.", group=MODEL)
    ] = None
    num_pipeline_ranks: Annotated[int | None, Option(help="Under torchrun: stages of layers.", group=MODEL)] = None
    tensor_parallel: Annotated[int | None, Option(help="Under torchrun: shards of each layer.", group=MODEL)] = None
    expert_parallel: Annotated[
        int, Option(help="Under torchrun: groups that a mixture's experts are divided into.", group=MODEL)
    ] = 1
    distributed_timeout: Annotated[
        float, Option(help="Seconds after which a rank that does not answer counts as gone.", group=MODEL)
    ] = 120.0
    ignore_unexpected: IgnoreUnexpected = False

    def open(self, path: Path | None, **others: Any) -> LLM:
        """The model, with a line of progress on the terminal while it loads. others: more arguments of `LLM`."""
        # numpy's own threads, which no model needs, would spin on the cores that import and load the rest.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from maestrale.llm import LLM

        with progress_line("loading") as progress:
            return LLM(path, require_tokenizer=True, progress=progress, **vars(self), **others)


@dataclass(frozen=True)
class Writing(Running):
    """How a verb runs a model that continues texts."""

    max_len: Annotated[int | None, Option(help="Longest prompt and completion together, in tokens.", group=MODEL)] = (
        None
    )
    max_batch_tokens: MaxBatchTokens = None
    prefix_cache: Annotated[
        bool, Option(help="Keep what was computed for texts that begin alike; changes no text.", group=MODEL)
    ] = True
    speculate: Annotated[
        bool, Option(help="Try again what the text has said before, checked at once; changes no text.", group=MODEL)
    ] = True


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: fields of `SamplingParams`, under their names."""

    temperature: Temperature = 0.7
    top_k: Annotated[int, Option(help="Draw from the k likeliest only; 0 is all.", group=SAMPLING)] = 0
    top_p: Annotated[float, Option(help="Draw from the likeliest up to this share of probability.", group=SAMPLING)] = (
        0.95
    )
    min_p: Annotated[
        float, Option(help="Leave out tokens less likely than this share of the likeliest.", group=SAMPLING)
    ] = 0.0
    repetition_penalty: Annotated[
        float, Option(help="Above 1, tokens that stand already become less likely.", group=SAMPLING)
    ] = 1.0
    seed: Annotated[int | None, Option(help="The same seed draws the same text.", group=SAMPLING)] = None


def talker(path: Path | None) -> Path:
    """The model to talk with: `path`, or without one the bundled model that has learnt to chat."""
    from maestrale.launch import BUNDLED

    return path or BUNDLED / TALKER


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
    """The text of a UTF-8 file; - is standard input. UsageError where it cannot be read, or is too long."""
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else open(path, "rb") as file:
            content = file.read(_MAX_TEXT + 1)
        if len(content) > _MAX_TEXT:
            raise UsageError(f"{path}: expected at most {readable_bytes(_MAX_TEXT)} of text: split it")
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
