"""Ranks as their launchers start them, and processes that need not import torch first."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from maestrale.cli import main

SOURCE = str(Path(__file__).parents[2] / "src")
WARM = multiprocessing.get_context("forkserver")  # processes forked from one that has imported these
WARM.set_forkserver_preload(
    ["maestrale.llm", "maestrale.parallel.runner", "maestrale.native_backend.stage", "maestrale.torch_backend.stage"]
)
PLAIN = {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}  # torchrun's own warnings are not ours


def torchrun(ranks: int, *options: object) -> tuple[str, ...]:
    """For `python`, before what a rank runs."""
    return ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *map(str, options or ["--standalone"]))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Of one of several ranks that no torchrun watches: its agent would end the others as soon as one has."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return PLAIN | common | {"LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start(command: list[object], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def say_into(file: Path) -> None:
    """From here on, what this process writes goes there."""
    with open(file, "wb") as opened:
        for stream in (1, 2):
            os.dup2(opened.fileno(), stream)


def rank_of_command(environment: dict[str, str], said: Path, arguments: Sequence[object]) -> None:
    """For WARM: `maestrale ARGUMENTS` as one of several ranks."""
    os.environ.update(environment)
    say_into(said)
    sys.argv = ["maestrale", *map(str, arguments)]
    main()


def run(
    verb: str, *arguments: object, launcher: Sequence[object] = (), said: str = ""
) -> subprocess.CompletedProcess[str]:
    """`maestrale VERB ARGUMENTS`, by a launcher or alone. said: what it reads."""
    return subprocess.run(
        [*map(str, launcher or [sys.executable]), "-m", "maestrale", verb, *map(str, arguments)],
        input=said,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | PLAIN,
    )


def check_same_words(
    launcher: Sequence[object], split: Sequence[object], verb: str, *arguments: object, said: str = ""
) -> None:
    """Over ranks a verb writes what it writes in one process, which is something."""
    alone = run(verb, *arguments, said=said)
    ranks = run(verb, *arguments, *split, launcher=launcher, said=said)
    assert (alone.returncode, ranks.returncode) == (0, 0), alone.stderr + ranks.stderr
    assert alone.stdout
    assert alone.stdout == ranks.stdout


def rank_of(agent: int, rank: int) -> psutil.Process:
    """The process of that rank among the children of torchrun's."""
    for child in psutil.Process(agent).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise LookupError(f"no rank {rank}")


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def gone(process: psutil.Process) -> bool:
    """Ended, though nobody may have asked how: its launcher waits for an answer over a cable, or is gone too."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
