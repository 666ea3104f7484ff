"""What may be typed after a slash in a conversation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from maestrale.cli.conversation import Chat
from maestrale.cli.strip import strip
from maestrale.errors import CheckpointError, RequestError, UsageError, shown

if TYPE_CHECKING:
    from maestrale.cli.session import Session

# Fields of SamplingParams that make sense for one reply at a time.
SETTINGS = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "stop", "min_tokens"),
)


@dataclass(frozen=True)
class Command:
    """arguments: as the help shows them. run: gives False to leave."""

    run: Callable[[Session, str], bool | None]
    arguments: str
    help: str


def run_command(session: Session, line: str) -> bool:
    """Whether to stay. RequestError for a command that there is not, or that cannot be done now."""
    word, _, rest = line[1:].strip().partition(" ")
    command = COMMANDS.get({"help": "?", "exit": "quit", "bye": "quit"}.get(word, word))
    if command is None:
        near = get_close_matches(word, COMMANDS, 1)
        print(f"/{word}: no such command; {f'/{near[0]}, perhaps? ' if near else ''}/? lists them")
        return True
    if rest.strip() and not command.arguments:
        raise UsageError(f"/{word}: takes nothing after it, got {shown(rest.strip())}")
    return command.run(session, rest.strip()) is not False


def _help(session: Session, rest: str) -> None:
    width = max(len(f"/{name} {command.arguments}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        print(f"{f'/{name} {command.arguments}':{width}}  {command.help}")
    note = 'Between """ and """ a message may have several lines; so may one that is pasted, or typed with Alt-Enter.'
    print("", *wrap(note, get_terminal_size().columns - 1), sep="\n")
    print("Ctrl-C stops a reply; at the empty prompt it leaves, as Ctrl-D does.")


def _set(session: Session, rest: str) -> None:
    name, _, value = rest.partition(" ")
    name = name.replace("-", "_")
    if name and name not in SETTINGS:
        raise RequestError(f"/set {name}: expected one of {', '.join(SETTINGS)}", name)
    if value.strip():
        session.params = replace(session.params, **{name: _value(value.strip())})
    for setting in [name] if name else SETTINGS:
        held = getattr(session.params, setting)
        print(f"{setting} = {json.dumps(held, ensure_ascii=False)}")


def _value(text: str) -> Any:
    """A number, a list or a quoted text as JSON has it; none; anything else is text itself."""
    if text.lower() in ("none", "off"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _system(session: Session, rest: str) -> None:
    from maestrale.cli.reading import unfenced

    chat = session.conversation
    if not isinstance(chat, Chat):
        raise RequestError("/system: a text has no system message; it is for chats", "system")
    if rest:
        chat.system = "" if rest in ('""', "none", "off") else unfenced(rest)
    print(f"system: {chat.system}" if chat.system else "no system message; /system TEXT sets one")


def _show(session: Session, rest: str) -> None:
    config = session.llm.config
    experts = f", {config.moe.num_experts} experts, {config.moe.num_experts_per_tok} a token" if config.moe else ""
    windows = sorted({f"{w:,}" for w in config.sliding_window if w})
    print(f"model    {session.name}: {config.n_layers} layers, dim {config.dim:,}{experts}")
    print(f"window   {', '.join(windows) if windows else 'none'}")
    print(f"context  {session.used:,} of {session.llm.max_len:,} tokens")
    print(f"form     {session.conversation.form}")
    if isinstance(session.conversation, Chat) and session.conversation.system:
        print(f"system   {session.conversation.system}")
    changed = {name: getattr(session.params, name) for name in SETTINGS}
    words = ", ".join(f"{name}\0{value}" for name, value in changed.items() if value not in (None, ()))
    lines = wrap(words, max(get_terminal_size().columns - 9, 20), break_long_words=False)
    print("settings " + "\n         ".join(lines).replace("\0", " "))


def _save(session: Session, rest: str) -> None:
    from maestrale.checkpoint.writer import atomic_file, write_json

    path = _path("save", rest)
    if path.exists() and str(path) not in session.own_files:
        raise UsageError(f"/save {rest}: exists already, and is not of this conversation: take another name")
    with atomic_file(path) as partial:
        partial.chmod(0o600)
        write_json(partial, session.conversation.saved())
    session.own_files.add(str(path))
    print(f"saved: {path}")


def _load(session: Session, rest: str) -> None:
    from maestrale.checkpoint.jsonfile import read_json

    path = _path("load", rest)
    try:
        session.conversation.load(read_json(path))
    except RequestError as error:
        raise RequestError(f"{path}: {error}", error.param) from None
    except CheckpointError as error:
        raise RequestError(str(error), "load") from None
    session.own_files.add(str(path))
    session.said, session.used = None, session.conversation.size()
    print(f"loaded: {session.used:,} tokens")


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise UsageError(f"/{command}: expected a file, as in /{command} conversation.json")
    return Path(os.path.abspath(os.path.expanduser(rest)))


def _clear(session: Session, rest: str) -> None:
    session.conversation.clear()
    session.said, session.used = None, 0


def _retry(session: Session, rest: str) -> None:
    session.retry()


def _experts(session: Session, rest: str) -> None:
    from rich.console import Console

    moe = session.llm.config.moe
    if moe is None:
        raise RequestError("/experts: this model is no mixture of experts", "experts")
    if session.said is None or not session.said.experts:
        raise RequestError("/experts: there is no reply yet", "experts")
    console = Console(highlight=False)
    console.print(strip(session.said.experts, moe.num_experts, console.width))


def _quit(session: Session, rest: str) -> bool:
    return False


COMMANDS = {
    "?": Command(_help, "", "this list; /help too"),
    "set": Command(_set, "[NAME VALUE]", "temperature, top_p, max_tokens …; alone, it shows them"),
    "system": Command(_system, "[TEXT]", 'the system message; "" removes it'),
    "show": Command(_show, "", "the model, the context and the settings"),
    "save": Command(_save, "FILE", "the conversation as JSON"),
    "load": Command(_load, "FILE", "one that was saved here, or by the chat page"),
    "clear": Command(_clear, "", "start anew"),
    "retry": Command(_retry, "", "another reply to the same"),
    "experts": Command(_experts, "", "which experts gave each token of the reply, in colour"),
    "quit": Command(_quit, "", "leave"),
}
