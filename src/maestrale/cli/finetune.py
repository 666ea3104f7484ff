"""`maestrale finetune`: a model and samples to an adapter, a model or a classifier."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Annotated

from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option
from maestrale.errors import UsageError

_EXTRA = ("torch", "yaml", "matplotlib")


def finetune(
    model: Annotated[Path, Argument(help="A model folder, or a bundled model's name.")],
    data: Annotated[str | None, Argument(help="Samples (see data check), instead of data.train.")] = None,
    config: Annotated[
        Path | None,
        Option(help="A .yaml or .toml file, such as examples/finetune-lora.yaml."),
    ] = None,
    task: Annotated[str | None, Option(help="What to learn.", metavar="lm|dpo|classify")] = None,
    method: Annotated[str | None, Option(help="What learns.", metavar="lora|dora|qlora|full")] = None,
    heldout: Annotated[str | None, Option(help="Samples to measure by.")] = None,
    out: Annotated[str | None, Option(help="Folder to write.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last saved state, bit for bit.")] = False,
    force: Annotated[bool, Option("--force", help="Begin again, and replace what is there.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Fine-tune a model. The run is kept beside OUT, in OUT.run: state, log, picture of the losses.

    An adapter is run by `generate --adapter OUT` and put into the weights by `merge`. On several processes or
    machines: torchrun --nproc-per-node 2 -m maestrale finetune …
    """
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise UsageError(f"training needs {', '.join(missing)}: pip install 'maestrale[train]'")
    if resume and force:
        raise UsageError("--resume goes on with a run and --force begins again: give one of them")
    from maestrale.choices import nearest_rounding
    from maestrale.launch import model_folder
    from maestrale.parallel.launcher import world
    from maestrale.torch_backend.train.finetune import finetune as run
    from maestrale.torch_backend.train.finetune_settings import read_finetune_settings

    settings = read_finetune_settings(
        config, model=str(model_folder(model)), train=data, task=task, method=method, heldout=heldout, out=out
    )

    def notice(line: str) -> None:
        print(f"maestrale: {line}", file=sys.stderr)

    result = run(settings, resume, force, notice, nearest_rounding())
    if world()[0]:
        return
    if as_json:
        print(json.dumps(vars(result)))
        return
    loss = "" if result.heldout_loss is None else f", held-out loss {result.heldout_loss:.4f}"
    if result.heldout_accuracy is not None:
        loss += f", {result.heldout_accuracy:.1%} right"
    picture = os.path.join(result.out + ".run", "loss.png")
    print(f"{result.out}: {result.learnable:,} parameters learnt in {result.steps:,} steps{loss}; losses in {picture}")
