"""A reply's experts in colour: a column for each token, a row for each layer.

A cell is two half blocks: the upper one has the colour of the router's first choice, the lower one of its second.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_GOLDEN = 0.381966  # of a turn around the hues: neighbours differ, and no two of many experts look alike


def colour(expert: int, n_experts: int) -> str:
    """#rrggbb: hues evenly spread for up to 12 experts, by the golden angle for more."""
    hue = expert / n_experts if n_experts <= 12 else expert * _GOLDEN % 1
    rgb = colorsys.hls_to_rgb(hue, 0.45 + 0.2 * (expert % 2), 0.75)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def strip(experts: Sequence[Sequence[Sequence[int]]], n_experts: int, width: int) -> Text:
    """experts: [tokens][layers][K]. Blocks of at most `width` columns, then each expert's colour and share."""
    from rich.text import Text

    n_layers = len(experts[0])
    margin = len(str(n_layers - 1)) + 1
    shown = Text()
    for start in range(0, len(experts), max(width - margin, 1)):
        columns = experts[start : start + max(width - margin, 1)]
        for layer in range(n_layers):
            shown.append(f"{layer:>{margin - 1}} ", "dim")
            for column in columns:
                first, last = column[layer][0], column[layer][1 if len(column[layer]) > 1 else 0]
                shown.append("▀", f"{colour(first, n_experts)} on {colour(last, n_experts)}")
            shown.append("\n")
        shown.append("\n")
    counts = Counter(expert for token in experts for layer in token for expert in layer)
    total = sum(counts.values())
    for expert in range(n_experts):
        shown.append("█ ", colour(expert, n_experts))
        shown.append(f"{expert}: {counts[expert] / total:.0%}  ")
    return shown
