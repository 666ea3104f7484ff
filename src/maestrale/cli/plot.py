"""`maestrale plot`: the losses of training runs as a picture, beside each other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option
from maestrale.errors import DataError, UsageError

_LOG = "log.jsonl"


def plot(
    runs: Annotated[list[Path], Argument(help="Of each run OUT, OUT.run or its log.jsonl; several in one picture.")],
    out: Annotated[Path, Option("--out", "-o", help="The picture to write, a PNG.")] = Path("losses.png"),
    force: Annotated[bool, Option("--force", help="Replace the picture if it is there.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Draw the losses of training runs, training and held-out, over their steps. A run that still goes on may be
    drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("drawing needs matplotlib: pip install 'maestrale[plot]'")
    from maestrale.checkpoint.writer import atomic_file
    from maestrale.torch_backend.train.losses import draw_losses

    logs = {_name(run): _log(run) for run in runs}
    if len(logs) < len(runs):  # runs of one name in several folders
        logs = {str(run): _log(run) for run in runs}
    found = [_last(name, log) for name, log in logs.items()]
    with atomic_file(out, force) as partial:
        draw_losses(logs, partial)
    if as_json:
        print(json.dumps({"out": str(out), "runs": found}))
        return
    for run in found:
        heldout = "" if run["heldout"] is None else f", held-out {run['heldout']:.4f}"
        print(f"{run['name']}: step {run['step']:,}, loss {run['loss']:.4f}{heldout}")
    print(out)


def _log(run: Path) -> Path:
    places = (run, run / _LOG, run.with_name(run.name + ".run") / _LOG)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(f"{run}: no run's log; expected {_LOG}, or the folder that train or finetune wrote beside OUT")
    return found


def _name(run: Path) -> str:
    return (run.parent if run.name == _LOG else run).name.removesuffix(".run")


def _last(name: str, log: Path) -> dict[str, Any]:
    """What the log says last of both losses."""
    from maestrale.torch_backend.train.losses import is_number, read_log

    lines = read_log(log)
    trained = [line for line in lines if is_number(line.get("loss"))]
    heldout = [line["heldout_nats_per_token"] for line in lines if is_number(line.get("heldout_nats_per_token"))]
    if not trained:
        raise DataError(f"{log}: no losses yet; train and finetune write one every few steps")
    step, loss = trained[-1]["step"], trained[-1]["loss"]
    return {"name": name, "step": step, "loss": loss, "heldout": heldout[-1] if heldout else None}
