"""The loop that every run goes through: steps, held-out looks, states to go on from, one owner, an orderly stop.

Beside the folder `out` stands `out.run`: state.safetensors, log.jsonl (a line every few steps), loss.png, and what
the kind of run keeps there. Killed at any moment, a run goes on from the last state. Nothing in it is a pickle, but on
several ranks: the parts that torch's distributed checkpointing writes have an index that is one.
"""

from __future__ import annotations

import fcntl
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from maestrale.checkpoint.writer import atomic_file
from maestrale.errors import SIGINT_EXIT, SIGTERM_EXIT, DiskError, MaestraleError, UsageError
from maestrale.memory import give_back_memory
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train import step as steps
from maestrale.torch_backend.train.losses import draw_losses
from maestrale.torch_backend.train.objective import Objective
from maestrale.torch_backend.train.packing import batch_rows
from maestrale.torch_backend.train.parallel import Ranks
from maestrale.torch_backend.train.report import Report
from maestrale.torch_backend.train.settings import LoopSettings
from maestrale.torch_backend.train.state import Progress, States

_HELDOUT_ROWS = 64  # of the held-out data, looked at now and then
_TRIM_EVERY = 10  # steps: batches differ in how many tokens they learn, and holes of all sizes fill the heap


@dataclass(frozen=True)
class _Learning:
    """What learns, from what, and by what it is judged."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    objective: Objective
    heldout: Objective | None
    keep_best: bool


class Run:
    """A run's folder and its states. `out` is only looked at: whoever exports writes it."""

    def __init__(self, settings: LoopSettings, resume: bool, force: bool, ranks: Ranks | None = None):
        """UsageError where the run or its output is there already and neither `resume` nor `force` says what to do."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.resume, self.force, self.ranks = settings, resume, force, ranks or Ranks()
        self.out = Path(settings.out)
        self.folder = self.out.with_name(self.out.name + ".run")
        self.states = States(self.folder, self.ranks)
        if self.out.exists() and not force and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UsageError(f"{self.out}: exists and is not empty; --force replaces it")
        if self.states.exists() and not (resume or force):
            raise UsageError(f"{self.states.path}: a run is there; --resume continues it, --force begins again")
        if resume and not self.states.exists():
            raise UsageError(f"{self.states.path}: no run to resume")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Only one process (of torchrun's, the first) trains into a folder. UsageError for the second."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise DiskError(f"{self.folder}: cannot write: {error.strerror}") from error
        with lock:
            try:
                if self.ranks.first:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{self.folder}: another process is training there; wait for it") from None
            if not self.resume:
                self.states.clear()
            yield

    def go(self, model: Transformer, objective: Objective, heldout: Objective | None, keep_best: bool = False) -> float:
        """All steps, from the last state if it is resumed; seconds spent.

        keep_best: the weights of the lowest held-out loss stand in the model afterwards, not the last ones.
        DiskError where states would not fit. MaestraleError where the loss is no finite number. After SIGINT or
        SIGTERM the state is saved and SystemExit leaves with 130 or 143.
        """
        settings = self.settings
        steps.keep_less(model, settings)
        optimizer = steps.new_optimizer(model, settings)
        learning = _Learning(model, optimizer, objective, heldout, keep_best)
        digest = objective.digest()
        done = Progress(step=0, data=digest, seconds=0.0)
        if self.resume:
            done = self.states.load(model, optimizer, settings.to_dict())
            if done.data != digest:
                raise UsageError(f"{self.states.path}: the training data has changed since; --force begins again")
        self.states.require_space(model)
        if settings.compile:
            steps.compile_parts(model)
        self.report = Report(self.folder / "log.jsonl", settings, done.step, silent=not self.ranks.first)
        if 0 < settings.steps <= settings.warmup_steps:
            self.report.tell(
                f"warmup_steps = {settings.warmup_steps} and {settings.steps} steps: the learning rate never comes to "
                f"lr = {settings.lr:g}; lower warmup_steps"
            )
        with self.report, _stop_signals(self.report.stopping) as stopped:
            seconds = self._loop(learning, done, stopped)
        if keep_best and heldout is not None:
            self.states.load_best(model)
        return seconds

    def draw(self) -> None:
        if self.ranks.first:
            with atomic_file(self.folder / "loss.png") as partial:
                draw_losses({"": self.folder / "log.jsonl"}, partial)

    def _loop(self, learning: _Learning, done: Progress, stopped: list[int]) -> float:
        """The steps from `done` to the last; seconds spent, those of earlier runs included. stopped: signals."""
        settings, report, best = self.settings, self.report, done.best
        model, optimizer, objective, heldout = learning.model, learning.optimizer, learning.objective, learning.heldout
        begun = time.monotonic() - done.seconds
        for step in range(done.step, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = steps.learning_rate(settings, step)
            rows = batch_rows(len(objective), settings.batch_size, step, settings.seed)
            learnt = steps.learn(model, optimizer, objective, rows, settings, self.ranks)
            if not learnt.finite:
                raise MaestraleError(
                    f"step {step + 1}: loss {learnt.loss}, gradient norm {learnt.norm}: the run is stopped; "
                    f"{self.states.kept()}; lower lr"
                )
            report.step(step + 1, learnt, optimizer.param_groups[0]["lr"])
            if (step + 1) % _TRIM_EVERY == 0:
                give_back_memory()
            last = step + 1 == settings.steps
            looks = (step + 1) % settings.heldout_every == 0
            if heldout is not None and ((last and learning.keep_best) or (looks and not last)):
                loss = self.look(model, heldout)
                report.heldout(step + 1, loss)
                if learning.keep_best and (best is None or loss < best):
                    best = loss
                    self.states.save_best(model)
            stop = bool(self.ranks.sum(torch.tensor(len(stopped))))  # all ranks after the same step
            if (step + 1) % settings.save_every == 0 or last or stop:
                progress = Progress(step + 1, done.data, time.monotonic() - begun, best)
                self.states.save(model, optimizer, progress, settings.to_dict())
            if stop:
                report.stopped(step + 1)
                sys.exit(SIGTERM_EXIT if stopped and stopped[0] == signal.SIGTERM else SIGINT_EXIT)
        return time.monotonic() - begun

    def look(self, model: Transformer, heldout: Objective, everything: bool = False) -> float:
        """The mean loss of some of the held-out data, always the same, or of everything."""
        count = len(heldout) if everything else _HELDOUT_ROWS
        rows = np.unique(np.linspace(0, len(heldout) - 1, count).round().astype(np.int64))
        total, weight = steps.evaluate(model, heldout, rows, self.settings, self.ranks)
        return total / weight


@contextmanager
def _stop_signals(tell: Callable[[], None]) -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM is put into, and `tell` is called, so that a step can end before the run
    does. A second one does not wait."""
    stopped: list[int] = []

    def stop(received: int, frame: FrameType | None) -> None:
        if stopped:
            sys.exit(SIGTERM_EXIT if received == signal.SIGTERM else SIGINT_EXIT)
        stopped.append(received)
        tell()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
