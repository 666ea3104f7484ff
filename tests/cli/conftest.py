"""Two ways to run the command line, and the models to run it on."""

import io
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from byte_models import CONFIGS, ENVIRONMENT, Run
from terminal import Terminal
from tiny import hf_model, make_folder, write_tekken


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A random native folder for each of CONFIGS. Only to be read."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: make_folder(root / name, config) for name, config in CONFIGS.items()}
    for folder in folders.values():
        write_tekken(folder)
    return folders


@pytest.fixture(scope="session")
def references() -> dict:
    """The same models in transformers."""
    return {name: hf_model(config) for name, config in CONFIGS.items()}


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Run]:
    """`maestrale ARGS` in this process."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*args: object, stdin: str = "") -> Run:
        from maestrale.cli import main

        monkeypatch.setattr(sys, "argv", ["maestrale", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as left:
            main()
        return Run(left.value.code or 0, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def spawn():
    """`python -m maestrale ARGS` as a process of its own, with pipes; killed where a test leaves it running."""
    started = []

    def start(*args: object, **options: object) -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
        process = subprocess.Popen(
            [sys.executable, "-m", "maestrale", *map(str, args)], **{"env": ENVIRONMENT, "text": True} | pipes
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(*args, **options):
        opened.append(Terminal(tmp_path / "state", *args, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()
