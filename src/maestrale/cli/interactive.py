"""`maestrale interactive`: a prompt, a reply, and again."""

from __future__ import annotations

from typing import Annotated

from maestrale.cli import options as opt
from maestrale.cli.chat import converse
from maestrale.cli.declare import Option


def interactive(
    sampling: opt.Sampling,
    model: opt.Writing,
    path: opt.Model = None,
    instruct: Annotated[
        bool, Option("--instruct", help="A chat with an instruct model, not a text to go on with.")
    ] = False,
    max_tokens: opt.MaxTokens = 256,
    adapter: opt.Adapter = None,
) -> None:
    """Write a text with the model, line by line.

    With --instruct, talk with it, as `chat` does.

    Each line is added to the text, and the model goes on from there; an empty line lets it go on. /? lists the
    commands.
    """
    from maestrale.launch import model_folder

    folder = opt.talker(path) if instruct else model_folder(path)
    converse(folder, "chat" if instruct else "text", None, False, max_tokens, sampling, model, adapter)
