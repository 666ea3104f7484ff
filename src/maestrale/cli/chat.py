"""`maestrale chat`: talk with a model at the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from maestrale.cli import options as opt
from maestrale.cli.declare import Option
from maestrale.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

FORMS = ("auto", "chat", "text")


def chat(
    sampling: opt.Sampling,
    model: opt.Writing,
    path: opt.Model = None,
    system: Annotated[str | None, Option(help="A system message.")] = None,
    form: Annotated[
        str, Option(help="chat: messages in turns; text: one text that you and the model write; or auto.")
    ] = "auto",
    plain: Annotated[bool, Option("--plain", help="Show replies as they are written, no Markdown.")] = False,
    max_tokens: opt.MaxTokens = 1024,
    adapter: opt.Adapter = None,
) -> None:
    """Talk with a model. /? lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.

    Without MODEL it is the bundled stories-chat. A model that has not learnt to chat, as the other bundled ones, goes
    on with your text instead.
    """
    converse(opt.talker(path), form, system, plain, max_tokens, sampling, model, adapter)


def converse(
    path: Path,
    form: str,
    system: str | None,
    plain: bool,
    max_tokens: int,
    sampling: opt.Sampling,
    model: opt.Writing,
    adapter: Path | None,
) -> None:
    """Opens the model and talks."""
    if form not in FORMS:
        raise UsageError(f"--form {form}: expected one of {', '.join(FORMS)}")
    from maestrale.cli.conversation import Chat, Conversation, Text
    from maestrale.cli.session import Session
    from maestrale.sampling.params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, **vars(sampling))  # a wrong value is refused before a weight is read
    llm = model.open(path, adapters={"adapter": adapter} if adapter else None)
    params = replace(params, experts=llm.config.moe is not None)
    name = path.resolve().name
    conversation: Conversation
    if form == "chat" or (form == "auto" and llm.tokenizer.chats):
        llm.tokenizer.encode_chat([{"role": "user", "content": ""}])  # a tokenizer without a chat form is told now
        conversation = Chat(llm.tokenizer)
        conversation.system = system or ""
    else:
        if system:
            raise UsageError(
                f"--system: {name} goes on with a text, which has no system message; --form chat forces one"
            )
        if form == "auto":
            print(
                f"{name} has not learnt to chat: it goes on with your text; an empty line lets it go on",
                file=sys.stderr,
            )
        conversation = Text(llm.tokenizer)
    Session(llm, name, conversation, params, plain, "adapter" if adapter else None).run()
