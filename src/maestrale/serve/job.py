"""One HTTP request's work on its way through the service, and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from maestrale.llm import Completion, Request
from maestrale.sampling.params import SamplingParams
from maestrale.serve.problems import ApiError

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """One prompt of a job. reply: the text begins anew, as a chat's answer does. adapter: what it goes through.
    tenant: whose it is; cached pages are never shared between two of them."""

    ids: Sequence[int]
    params: SamplingParams
    reply: bool = False
    adapter: str | None = None
    tenant: str = ""


@dataclass(frozen=True)
class Piece:
    """What a step adds to a prompt's continuation; number: which prompt of the job."""

    number: int
    completion: Completion


@dataclass(frozen=True)
class Chore:
    """Work on the model beside the engine's: an iterator that gives None after each bit of it, and then the result."""

    work: Iterator[Any]
    result: asyncio.Future[Any]


class Job:
    """The work of one HTTP request. streaming: whether pieces are wanted as they come, or the whole at the end."""

    def __init__(self, work: Sequence[Work], streaming: bool, accepted: asyncio.Future[None]):
        self.work, self.streaming, self.accepted = work, streaming, accepted
        self.began = time.monotonic()
        self.last: float | None = None  # when its last piece came
        self.started = self.spoken = self.ended = False
        self.error: ApiError | None = None
        self._arrived: list[Piece] = []
        self._news = asyncio.Event()
        self._requests: list[Request] = []

    @property
    def cached(self) -> int:
        """Tokens of its prompts that were found in the cache. To be asked when it has ended."""
        return sum(request.cached for request in self._requests)

    def arrive(self, pieces: list[Piece]) -> int:
        """Pieces of a stream; how many nobody has taken yet."""
        self._arrived += pieces
        self._news.set()
        return len(self._arrived)

    async def pieces(self, patience: float) -> AsyncIterator[list[Piece]]:
        """All that has arrived since the last time, a piece for each continuation, again and again; [] after `patience`
        seconds of silence, or up to twice as many: a timer for each token would cost more than all else here.

        Raises the ApiError that ended the job, after the pieces that came before it.
        """
        loop, silent, ping = asyncio.get_running_loop(), False, False
        timer = loop.call_later(patience, lambda: tick())

        def tick() -> None:
            nonlocal timer, silent, ping
            timer = loop.call_later(patience, tick)
            if silent:
                ping = True
                self._news.set()
            silent = True

        try:
            while self._arrived or not self.ended:
                if not self._arrived:
                    self._news.clear()
                    await self._news.wait()
                arrived, self._arrived = self._arrived, []
                if arrived or ping:
                    silent, ping = False, False
                    yield _joined(arrived)
        finally:
            timer.cancel()
        if self.error is not None:
            raise self.error

    async def completions(self) -> list[list[Completion]]:
        """When all is done: for each prompt its n completions, in order. Raises the ApiError that ended the job."""
        while not self.ended:
            self._news.clear()
            await self._news.wait()
        if self.error is not None:
            raise self.error
        return [sorted(request.completions, key=lambda completion: completion.index) for request in self._requests]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Those of one continuation as one piece."""
    first: dict[tuple[int, int], Piece] = {}
    for piece in pieces:
        key = piece.number, piece.completion.index
        if key in first:
            first[key].completion.add(piece.completion)
        else:
            first[key] = piece
    return list(first.values())


def settle(future: asyncio.Future[T], result: T, error: Exception | None) -> None:
    """Ends a future that nobody may wait for any more."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
