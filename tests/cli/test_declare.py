"""Verbs declared by their signatures, and the groups of options that they share."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
import pytest
from byte_models import ENVIRONMENT

from maestrale import cli
from maestrale.cli import options as opt
from maestrale.cli.declare import Argument, Option, make_command
from maestrale.errors import UsageError


@dataclass(frozen=True)
class Cups:
    size: Annotated[int, Option(help="How large.", group="Cups")] = 3
    lid: Annotated[bool, Option(help="Closed.", group="Cups")] = True


def serve_tea(
    cups: Cups,
    guest: Annotated[Path, Argument(help="For whom.")],
    kind: Annotated[str, Option("--kind", "-k", help="Which.")],
    milk_jugs: Annotated[list[float] | None, Option(help="How much.")] = None,
    hot: Annotated[bool, Option(help="Hot.")] = False,
) -> None:
    """Serve tea. And
    nothing else."""
    served.append((cups, guest, kind, milk_jugs, hot))


served: list[tuple] = []


def call(*words: str) -> tuple:
    served.clear()
    make_command("tea", serve_tea, lambda verb: verb()).main(list(words), prog_name="tea", standalone_mode=False)
    return served[0]


def test_a_dataclass_stands_for_its_fields():
    assert call("me", "-k", "green") == (Cups(3, True), Path("me"), "green", None, False)
    words = ("--no-lid", "--size=5", "--kind", "x", "--milk-jugs", "1", "--milk_jugs", "2.5", "--hot", "--", "-me")
    assert call(*words) == (Cups(5, False), Path("-me"), "x", [1.0, 2.5], True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("me",), "'--kind'"),
        (("-k", "x"), "'GUEST'"),
        (("me", "-k", "x", "--size", "2.5"), "2.5"),
        (("me", "-k", "x", "--milk-jug", "1"), "--milk-jugs"),
        (("me", "you", "-k", "x"), "you"),
    ],
)
def test_wrong_words_are_named(words, said):
    with pytest.raises(click.ClickException) as refused:
        call(*words)
    assert said in refused.value.format_message()


def test_the_help_screen_has_arguments_then_options_then_groups():
    command = make_command("tea", serve_tea, lambda verb: verb())
    text = command.get_help(click.Context(command, info_name="tea"))
    order = [
        "Serve tea. And nothing else.",
        "Arguments:",
        "For whom.",
        "Options:",
        "-k, --kind",
        "Cups:",
        "[default: 3]",
    ]
    assert [text.index(word) for word in order] == sorted(text.index(word) for word in order)
    assert "--lid / --no-lid" in text
    assert "default: False" not in text


def options_of(name: str) -> set[str]:
    return {parameter.name for parameter in make_command(name, cli.find_verb(name), lambda verb: verb()).params}


@pytest.mark.parametrize(
    "verb", ["demo", "generate", "interactive", "chat", "serve", "eval", "bench", "embed", "classify"]
)
def test_every_verb_that_runs_a_model_takes_the_same_options(verb):
    assert set(vars(opt.Running())) <= options_of(verb)


@pytest.mark.parametrize("verb", ["demo", "generate", "interactive", "chat", "serve"])
def test_every_verb_that_continues_texts_takes_those_of_caching_and_speculation(verb):
    assert {"max_len", "max_batch_tokens", "prefix_cache", "speculate"} <= options_of(verb)


def test_switches_reach_the_model(command, monkeypatch, models):
    import maestrale.llm

    given = {}

    def opened(path, **options):
        given.update(options, path=path)
        raise UsageError("that is enough")

    monkeypatch.setattr(maestrale.llm, "LLM", opened)
    run = command("generate", models["dense"], "-p", "a", "--no-prefix-cache", "--no_speculate", "--threads", 2)
    assert run.err == "maestrale: that is enough\n"
    assert (given["path"], given["prefix_cache"], given["speculate"], given["threads"]) == (
        models["dense"],
        False,
        False,
        2,
    )
    assert (given["weights"], given["expert_parallel"], given["max_len"]) == ("auto", 1, None)


def test_a_shell_can_complete_verbs_and_options():
    def completed(line: str) -> list[str]:
        words = {
            "_MAESTRALE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        run = subprocess.run(
            [sys.executable, "-m", "maestrale"], env=ENVIRONMENT | words, capture_output=True, text=True, check=True
        )
        return [entry.partition(",")[2] for entry in run.stdout.splitlines()]

    assert completed("maestrale ge") == ["generate"]
    assert completed("maestrale generate --max-t") == ["--max-tokens"]


def test_a_verb_does_not_import_the_others():
    code = "import sys; from maestrale.cli import find_verb; find_verb('generate'); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "maestrale.cli.generate" in loaded
    assert not loaded & {"maestrale.cli.chat", "maestrale.cli.bench", "rich", "typer", "pydantic", "numpy"}


def test_the_file_of_a_training_says_what_the_command_line_leaves_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(
        "model: {dim: 16, n_layers: 1, n_heads: 2, hidden_dim: 24, vocab_size: 320, tied_embeddings: true}\n"
        f"steps: 2\nseq_len: 16\nout: {tmp_path}/out\ndata: {{train: [no-such-text.txt], heldout: b.txt}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["maestrale", "train", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "no-such-text.txt" in capsys.readouterr().err
