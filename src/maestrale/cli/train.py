"""`maestrale train`: a small model from scratch, from text files and a configuration."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option
from maestrale.errors import UsageError

_EXTRA = ("torch", "sentencepiece", "yaml", "matplotlib")


def train(
    config: Annotated[Path, Argument(help="A .yaml or .toml file, such as examples/train-stories.yaml.")],
    data: Annotated[
        list[str] | None,
        Option(help="Text files instead of the file's data.train; may be given again, may hold *."),
    ] = None,
    heldout: Annotated[str | None, Option(help="Instead of the file's data.heldout.")] = None,
    out: Annotated[str | None, Option(help="Folder to write instead of the file's out.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last saved state, bit for bit.")] = False,
    force: Annotated[bool, Option("--force", help="Begin again, and replace what is there.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Train a model from scratch. The run is kept beside OUT, in OUT.run: state, log, picture of the losses."""
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise UsageError(f"training needs {', '.join(missing)}: pip install 'maestrale[train]'")
    if resume and force:
        raise UsageError("--resume goes on with a run and --force begins again: give one of them")
    from maestrale.torch_backend.train.run import train as run
    from maestrale.torch_backend.train.settings import read_settings

    result = run(read_settings(config, data, heldout, out), resume, force)
    if as_json:
        print(json.dumps(vars(result)))
    else:
        print(
            f"{result.out}: {result.parameters:,} parameters, held-out loss {result.nats_per_token:.4f} nats per token "
            f"({result.bits_per_byte:.4f} bits per byte); losses in {os.path.join(result.out + '.run', 'loss.png')}"
        )
