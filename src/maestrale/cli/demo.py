"""`maestrale demo`: three prompts in one batch, greedily."""

from __future__ import annotations

import sys
import time

from maestrale.cli import options as opt
from maestrale.cli.generate import SEPARATOR
from maestrale.cli.writing import for_output, harmless

PROMPTS = (
    "This is a test",
    "This is another great test",
    "This is a third test, mistral AI is very good at testing. ",
)


def demo(
    model: opt.Writing,
    path: opt.Model = None,
    max_tokens: opt.MaxTokens = 35,
    temperature: opt.Temperature = 0.0,
) -> None:
    """Continue three prompts in one batch.

    On a terminal they grow together over a line of progress.
    """
    from maestrale.sampling.params import SamplingParams

    llm = model.open(path)
    texts, tokens, start = list(PROMPTS), 0, time.perf_counter()
    pieces = llm.stream(PROMPTS, SamplingParams(max_tokens=max_tokens, temperature=temperature))

    def progress() -> str:
        seconds = time.perf_counter() - start
        return f"{tokens} of at most {max_tokens * len(texts)} tokens, {tokens / seconds:,.0f} tokens/s"

    if sys.stdout.isatty():
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

        console = Console(highlight=False)
        with Live(console=console, transient=True, refresh_per_second=20) as live:
            for piece in pieces:
                texts[piece.index] += piece.text
                tokens += len(piece.token_ids)
                shown = (Text(f"{harmless(text)}\n{SEPARATOR}") for text in texts)
                live.update(Group(*shown, Text(progress(), style="dim")))
    else:
        for piece in pieces:
            texts[piece.index] += piece.text
            tokens += len(piece.token_ids)
    for text in texts:
        print(for_output(text))
        print(SEPARATOR)
    print(progress(), file=sys.stderr)
