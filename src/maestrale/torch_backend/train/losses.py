"""A run's log, and a picture of the losses of one run or several; without torch, for whoever looks on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maestrale.errors import DataError


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last one that a killed run left unfinished is none. DataError for other text."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    return [_line(path, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise DataError(f"{path}:{number}: expected a JSON object with a step, as train and finetune write it")
    return line


def draw_losses(logs: Mapping[str, Path], picture: Path) -> None:
    """Losses over steps, training and held-out, as a PNG. logs: those of some runs, each under what it is called; of a
    single one the lines are called training and held-out alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, log) in enumerate(logs.items()):
        lines, before = read_log(log), f"{name}, " if len(logs) > 1 else ""
        colours = (f"C{i}", f"C{i}") if before else ("C0", "C1")
        kinds = (("loss", "training", "-"), ("heldout_nats_per_token", "held-out", "o--" if before else "o-"))
        for (field, label, style), colour in zip(kinds, colours, strict=True):
            points = [(line["step"], line[field]) for line in lines if is_number(line.get(field))]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, label=before + label, linewidth=1, markersize=3
                )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120, format="png")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
