"""One of two ranks, in a process of its own. Rank 1 does its part badly; every rank writes how it ended, and leaves.

how: killed_loading, killed_idle, killed_prefill, killed_decode, hangs, bad_file (folder/bad is rank 1's), raises.
split: num_pipeline_ranks or tensor_parallel.
"""

import os
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

from parallel.start import say_into

from maestrale import LLM, SamplingParams
from maestrale.errors import DistributedError
from maestrale.parallel import runner
from maestrale.parallel.launcher import world


def fail(how: str) -> None:
    if how == "raises":
        raise ZeroDivisionError("made for the test")
    os.kill(os.getpid(), signal.SIGSTOP if how == "hangs" else signal.SIGKILL)


def die_when_idle(folder: Path) -> None:
    while not (folder / "idle").exists():
        time.sleep(0.05)
    fail("killed")


def main(how: str, backend: str, split: str, folder: Path) -> None:
    rank = world()[0]
    if rank == 1:
        if how == "killed_loading":
            import_module(f"maestrale.{backend}_backend.stage").open_stage = lambda *_, **__: fail(how)
        steps, run = [0], runner.Worker.run

        def counted(self, batch):
            steps[0] += 1
            if (how == "killed_prefill" and steps[0] == 1) or (
                how not in ("killed_idle", "bad_file") and steps[0] == 4
            ):
                fail(how)
            return run(self, batch)

        runner.Worker.run = counted
        if how == "killed_idle":
            threading.Thread(target=die_when_idle, args=(folder,), daemon=True).start()
    here = folder / "bad" if how == "bad_file" and rank == 1 else folder / "good"
    llm = LLM(here, backend=backend, dtype="float32", max_len=64, distributed_timeout=8, **{split: 2})
    if how == "killed_idle":
        (folder / "idle").touch()
        time.sleep(1)
    llm.generate([[1, 5, 9]], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))


def rank(environment: dict[str, str], said: Path, how: str, backend: str, split: str, folder: Path) -> None:
    """environment: what a launcher would tell it. said: the file that gets what it writes."""
    os.environ.update(environment)
    say_into(said)
    begun = time.monotonic()
    try:
        main(how, backend, split, folder)
    except DistributedError as error:
        print(
            f"rank {world()[0]} ended after {time.monotonic() - begun:.0f} s, code {error.exit_code}: {error}",
            flush=True,
        )
        sys.exit(error.exit_code)
