"""A reply as it comes: plain, or as Markdown on a terminal. What a model writes never drives the terminal."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_FRAMES = 12  # a second, at most
# Control characters would move the cursor, recolour or rename the window; line ends and tabs are text.
_HARMLESS = {i: 0xFFFD for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"} | {ord("\r"): None}


def harmless(text: str) -> str:
    """`text` with U+FFFD for each control character but line ends and tabs; carriage returns fall away."""
    return text.translate(_HARMLESS)


def for_output(text: str) -> str:
    """`text` as it is where a file or a program reads it; on a terminal, harmless."""
    return harmless(text) if sys.stdout.isatty() else text


def write_plain(texts: Iterable[str]) -> None:
    """Each piece at once, then a line end. On a terminal words are not broken at the margin."""
    for text in _wrapped(texts, shutil.get_terminal_size().columns) if sys.stdout.isatty() else texts:
        print(text, end="", flush=True)
    print()


def _wrapped(texts: Iterable[str], width: int) -> Iterator[str]:
    """`texts` with a line end instead of the space before a word that would not fit; a word waits for its end."""
    from rich.cells import cell_len

    column, word = 0, ""
    for text in texts:
        *ended, word = re.split(r"(?<=\s)", word + harmless(text))
        for part in ended:
            shown = cell_len(part.rstrip())
            if column > 0 and column + shown > width:
                yield "\n"
                column = 0
            yield part
            column = 0 if part.endswith("\n") else (column + cell_len(part.expandtabs())) % width
    if column > 0 and column + cell_len(word) > width:
        yield "\n"
    yield word


def write_markdown(texts: Iterable[str]) -> None:
    """Finished blocks are printed for good and scroll away; the one being written is drawn again as it grows."""
    from rich.console import Console
    from rich.live import Live

    console, tail, drawn = Console(highlight=False), "", 0.0
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for text in texts:
            tail += harmless(text)
            if end := finished(tail):
                live.update("", refresh=True)
                console.print(_markdown(console, tail[:end]), "")
                tail = tail[end:]
            if time.monotonic() - drawn > 1 / _FRAMES:
                live.update(_markdown(console, tail, console.height - 2), refresh=True)
                drawn = time.monotonic()
    console.print(_markdown(console, tail), end="")


def finished(text: str) -> int:
    """How many characters at the beginning of `text`, Markdown, are blocks that nothing to come can change: all of
    its top-level blocks but the last."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().enable("table").parse(text)
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
    return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]]) if len(starts) > 1 else 0


def _markdown(console: Console, text: str, height: int | None = None) -> RenderableType:
    """`text` in the terminal's own colours, without blank lines around it; of more than `height` lines the last:
    what has scrolled away could not be drawn again."""
    from rich.markdown import Markdown
    from rich.segment import Segment, Segments

    # Links show their address: one that hides behind its text may lead anywhere.
    content = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
    lines = console.render_lines(content, pad=False)
    shown = [i for i, line in enumerate(lines) if any(part.text.strip() for part in line)]
    kept = lines[shown[0] : shown[-1] + 1] if shown else []
    if height is not None:
        kept = kept[-max(height, 1) :]
    return Segments([part for line in kept for part in (*line, Segment.line())])
